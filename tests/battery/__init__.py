"""Statistical battery: is the keyed permutation distinguishable from a random one?

`subjects` names what is tested (the real permutation, oracles, negative controls), `walks` the
keys it is tested under, `distributions` what a random permutation would do, `statistics` turns
counts into p-values, `single` and `joint` are the tests, `cases` the list of them with its sample
sizes, `bijectivity` the one exact test.
"""
