"""The zoo as a Markdown table, both forms at each model's own input size: python scripts/list_models.py [pattern]."""

import sys

import torch

import repblocks as rb


def row(name: str) -> str:
    with torch.device("meta"):  # shapes are all that counting needs
        model = rb.create_model(name)
    size = vars(model)["pretrained_cfg"]["input_size"]
    train, deploy = rb.profile(model, size), rb.profile(rb.deployed(model), size)
    millions = f"{train.params / 1e6:.2f} | {deploy.params / 1e6:.2f}"
    return f"| `{name}` | {size[1]} | {millions} | {train.macs / 1e9:.2f} | {deploy.macs / 1e9:.2f} |"


def main() -> None:
    names = rb.list_models(*sys.argv[1:])
    print("| model | input | params, train (M) | params, deploy (M) | MACs, train (G) | MACs, deploy (G) |")
    print("|---|---|---|---|---|---|")
    print("\n".join(map(row, names)))


if __name__ == "__main__":
    main()
