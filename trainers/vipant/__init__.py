"""Trainers of VIP-ANT: contrastive training, tagging, curation of captions, evaluation."""
