"""``python -m nsa_oracle``: the same as the command ``nsa-oracle``."""

from nsa_oracle.harness.__main__ import main

if __name__ == "__main__":
    main()
