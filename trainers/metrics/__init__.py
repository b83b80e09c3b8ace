"""Metrics of captions, retrieval and classification; on texts and tensors, without any model."""
