"""LongBench (Bai et al., arXiv 2308.14508): real tasks over long texts, in English."""
