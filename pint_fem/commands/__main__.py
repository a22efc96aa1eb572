"""``python -m pint_fem.commands``, where the program ``pint-fem`` is not on the path."""

from pint_fem.commands import main

if __name__ == "__main__":
    main()
