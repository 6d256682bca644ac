"""Tools around SFT and reward models: sampling reports, their scores, best-of-n, trees to rank, accuracy on ranked sets."""
