"""RULER (Hsieh et al., arXiv 2404.06654): synthetic tasks at any length of context."""
