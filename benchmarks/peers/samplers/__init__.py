"""Samplers of others: called as their documentations say, or restated where no package has them."""
