"""
Models of lmms-eval, by the names and places where it looks for them:

    LMMS_EVAL_PLUGINS=examples.evaluation python -m lmms_eval --model dali --model_args pretrained=DIR_OR_ID \
        --tasks TASK --batch_size 8
"""

AVAILABLE_MODELS = {"dali": "Dali"}
