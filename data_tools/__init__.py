"""Tools that turn images and captions into shards; run from the checkout."""
