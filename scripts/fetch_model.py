"""Fetches the small model that the quickstart trains, and prints where it lies; `rftjax fetch-model` is the same."""

from rftjax.weights.fetch_model import main

if __name__ == "__main__":
    main()
