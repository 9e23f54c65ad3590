"""Each parameter's momentum, whatever buckets DDP puts the parameters in."""

from collections.abc import Container, Iterator, Mapping, Sequence

import torch


class MomentumByPlace:
    """Momentum of this rank by the parameter's place in the model, in the parameter's shape.

    The kernels want the momentum of a bucket in one piece, so :meth:`gather` lays it out flat and keeps views into it:
    when DDP rebuilds its buckets, momentum moves along.
    """

    def __init__(self, momentum: Mapping[int, torch.Tensor] | None = None) -> None:
        self._momentum = dict(momentum or {})

    def items(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Copies in host memory, in the order of the model."""
        for place, momentum in sorted(self._momentum.items()):
            yield place, momentum.to("cpu", copy=True)

    def gather(
        self,
        parameters: Sequence[torch.Tensor],
        places: Sequence[int],
        bucket: torch.Tensor,
        without: Container[int] = (),
    ) -> torch.Tensor:
        """The momentum of ``bucket``, on its device, flat, in the order of its coordinates.

        Parameters at the places ``without`` have none: theirs is memory that nobody reads.

        float32, or float64 for float64 gradients: (1 - β)·g would be lost in a bfloat16 m.
        """
        numels = [parameter.numel() for parameter in parameters]
        wide = torch.float64 if bucket.dtype == torch.float64 else torch.float32
        flat = bucket.new_zeros(sum(numels), dtype=wide)
        pieces = torch.split(flat, numels)
        for parameter, place, piece in zip(parameters, places, pieces, strict=True):
            if place in without:
                continue
            view = _in_memory_order_of(parameter, piece)
            if place in self._momentum:
                momentum = self._momentum[place]
                if momentum.shape != view.shape:  # copy_ would stretch it
                    raise RuntimeError(f"momentum of parameter {place} has shape {momentum.shape}, not {view.shape}")
                view.copy_(momentum)
                if momentum.is_cuda:  # it is freed next, and may belong to another stream
                    momentum.record_stream(torch.cuda.current_stream(momentum.device))
            self._momentum[place] = view
        return flat


def _in_memory_order_of(parameter: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """``flat`` in the shape of ``parameter``, coordinates in the order in which DDP lays its gradient into a bucket."""
    dense = torch.empty_like(parameter, device="meta").stride() == parameter.stride()
    if dense:
        return flat.as_strided(parameter.size(), parameter.stride(), flat.storage_offset())
    return flat.view(parameter.size())
