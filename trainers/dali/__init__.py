"""Trainers of DALI: prefix tuning, alignment, pseudo-captions, distillation, evaluation."""
