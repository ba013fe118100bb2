"""What the tests of the report share: a small model, its report, and the page as a parsed tree."""

from html.parser import HTMLParser
from typing import Any

import torch
from torch import nn

import repblocks as rb
from repblocks.calibration import calibrate

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


def small_model(block: str = "repvgg") -> nn.Module:
    """A network of four blocks, with statistics as after training."""
    torch.manual_seed(0)
    model = rb.create_model(
        "rb_repvgg_cifar", block=block, depths=[1, 1, 1], widths=[8, 8, 16], in_chans=1, num_classes=4
    )
    return calibrate(model, torch.randn(8, 1, 32, 32)).eval()


def small_repnext(shortcut: str = "absorb") -> nn.Module:
    """Three blocks whose shortcuts can be absorbed or kept, with statistics as after training."""
    torch.manual_seed(0)
    model = rb.create_model(
        "rb_repnext_cifar", depths=[1, 1, 1], widths=[8, 8, 8], in_chans=1, num_classes=4, shortcut=shortcut
    )
    return calibrate(model, torch.randn(8, 1, 32, 32)).eval()


class Tree(HTMLParser):
    """Elements in order, each as its name and attributes, and the text of the cells of each table row."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data.strip()

    def named(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every element of this name."""
        return [attributes for name, attributes in self.elements if name == tag]
