"""Proposals of millions of images: lists of images and results as Parquet, computed on one machine or a cluster."""
