"""Parts of :func:`pint_fem.mgrit.check`: calls on copies, what is measured with them, and the report."""
