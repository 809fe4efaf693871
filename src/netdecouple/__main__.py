"""`python -m netdecouple` is the command line too."""

from netdecouple.cli import main

if __name__ == "__main__":
    main()
