"""The library in fifteen lines: extend a window, restore what that costs, and use the model with stock mlx-lm.

python examples/quickstart.py            # SmolLM2-135M, on text that every Python has: minutes
"""

from mlx_lm import generate, load

from mlx_linearard import DistillConfig, distill

# Your own: DistillConfig(model="mlx-community/SmolLM2-360M-Instruct", data="my-texts/", tokens=1_000_000, ...)
result = distill(DistillConfig(method="yarn", objective="logits", output="quickstart-run"))
for name in ("native", "scaled", "restored"):
    row = getattr(result, name)
    print(f"{name:>8}: perplexity {row.perplexity}, KL to native {row.kl:.4f}, top-1 agreement {row.agreement:.1%}")

model, tokenizer = load(str(result.run.model))
print(generate(model, tokenizer, "The window of this model is", max_tokens=20))
print(f"The report is {result.run.report}")
