# %% [markdown]
# What every head of a model needs.
#
# A notebook in cells, for any editor that knows `# %%`; as a script it writes `budgets.png`:
#
#     python examples/budgets.py bin/twilightd budgets.png

# %%
"""Draw what every head of SmolLM2-135M keeps, layer by layer and step by step."""

import sys

import matplotlib.pyplot as plt
import torch
from smollm2 import documentation, load

import twilight_client as tw
from twilight_client import hf

program, picture = (sys.argv[1:] + ["twilightd", "budgets.png"][len(sys.argv) - 1 :])[:2]
context, tokens = 2048, 32

# %% [markdown]
# The model decodes through a daemon; p is 0.95 of the attention.

# %%
tokenizer, model = load()
ids = torch.tensor([tokenizer(documentation())["input_ids"][:context]])
config = {"weight_estimator": {"type": "min_max_quant"}, "weight_pruner": {"type": "top_p", "threshold": 0.95}}
with tw.Daemon(program=program) as daemon, hf.enable(model, daemon.target, config) as twilight:
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)  # type: ignore[operator]
    budgets = twilight.budgets()
print(budgets)

# %% [markdown]
# On the left the mean of each head, on the right how the budget of each layer moves from token to token. The first two
# layers are dense.

# %%
figure, (heads, steps) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
image = heads.imshow(budgets.per_head(), aspect="auto", norm="log")
heads.set(title=f"tokens kept of {context}", xlabel="KV head", ylabel="layer")
figure.colorbar(image, ax=heads)
steps.plot(budgets.kept[:, 2:].mean(axis=(2, 3)), color="tab:blue", alpha=0.3)
steps.plot(budgets.kept[:, 2:].mean(axis=(1, 2, 3)), color="black", label="mean of the layers")
steps.set(title="from token to token", xlabel="step", ylabel="tokens kept", yscale="log")
steps.legend()
figure.savefig(picture, dpi=120)
