"""Models of Hugging Face's transformers that decode through a daemon.

A few lines around what there is::

    from twilight_client import hf

    hf.enable(model, "unix:///run/twilight/twilightd.sock", config="config_quest_twi.json")
    model.generate(**inputs, max_new_tokens=64)
    print(model.twilight.budgets())  # what every head kept
    hf.disable(model)

Prefill, and every layer with a sliding window, stay with the model's own attention. At each decode step the other
layers attend through the daemon, which reads keys and values where they lie: in memory that ``generate`` is given as
its cache and that is lent once. Any batch with left padding, grouped queries and every way of sampling work; beam
search, which reorders the cache, is refused. While the daemon is away the model attends by itself, and says so
(:class:`Twilight`).

Families that are tested: Llama, Mistral, Qwen2, Qwen3, Gemma 3, Phi. Whatever takes its attention from
``AttentionInterface`` should work; what cannot is refused by name.
"""

from ._model import Twilight, disable, enable
from .budgets import Budgets

__all__ = ["Budgets", "Twilight", "disable", "enable"]
