"""ExecuTorch's .pte: a program for phones and other small devices, its layers given to XNNPACK."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from repblocks.errors import CheckpointError
from repblocks.export.jobs import Job, traced

#: Images that the program takes at a time: its memory is planned ahead for that many.
LARGEST_BATCH = 8


def write(job: Job, path: Path) -> dict[str, Any]:
    """The graph, traced with a batch axis that has an end, or for single images where ExecuTorch runs no other."""
    batch = LARGEST_BATCH
    path.write_bytes(_lowered(job, batch))
    if not _runs(path, job.images):  # some of its operators only take shapes that are known ahead
        batch = 1
        path.write_bytes(_lowered(job, batch))
    return {"largest_batch": batch, "backend": "xnnpack"}


def open_file(path: Path) -> Callable[[Tensor], Any]:
    """What runs the program, in as many steps as its largest batch asks for.

    Raises:
        CheckpointError: ExecuTorch does not accept the file.
    """
    from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]  # an extra

    try:
        program = Runtime.get().load_program(path)  # not of bytes: it would not keep them alive
        method = program.load_method("forward")
    except RuntimeError as error:
        raise CheckpointError(f"{path} is not a program that ExecuTorch runs ({error}); export it again") from error
    batch = method.metadata.input_tensor_meta(0).sizes()[0]

    def run(images: Tensor) -> Any:
        parts = [method.execute([part.contiguous()]) for part in images.split(batch)]
        outputs = [torch.cat(same) for same in zip(*parts, strict=True)]
        return outputs[0] if len(outputs) == 1 else outputs

    return run


def _lowered(job: Job, batch: int) -> bytes:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # pyright: ignore[reportMissingImports]
        XnnpackPartitioner,
    )
    from executorch.exir import to_edge_transform_and_lower  # pyright: ignore[reportMissingImports]

    axes = {0: Dim("batch", min=1, max=batch)} if batch > 1 else {}
    program = traced(job.graph, job.images[:batch], axes)
    return to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch().buffer


def _runs(path: Path, images: Tensor) -> bool:
    run = open_file(path)
    try:
        run(images[:1])
        run(images[:2])
    except RuntimeError:
        return False
    return True
