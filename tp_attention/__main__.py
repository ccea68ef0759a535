"""python -m tp_attention: the command line, where no script is on the PATH."""

from tp_attention.cli import main

if __name__ == "__main__":
    main()
