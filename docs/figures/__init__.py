"""Pictures, counts and data of the pages: ``python -m docs.figures.NAME``, in the checkout."""
