"""`python -m persona.cli`."""

from persona.cli import main

if __name__ == "__main__":
    main()
