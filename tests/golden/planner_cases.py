"""What the checkers of the planner's golden sets share: a conversation from the arrays it is stored as."""

from __future__ import annotations

from torch import Tensor

from bernini.kernels import Segment, SegmentLayout
from bernini.planner.prompt import Conversation, Visual

MERGE = 2


def conversation(
    ids: Tensor, kinds: Tensor, numbers: Tensor, video_grids: Tensor, image_grids: Tensor, image_id: int
) -> Conversation:
    """From token ids, kinds (0 text, 2 source, 3 target), segment numbers and the visuals' grids in patches."""
    grids = {"video": iter(video_grids.tolist()), "image": iter(image_grids.tolist())}
    kind_list, number_list = kinds.tolist(), numbers.tolist()
    segments, visuals, start = [], [], 0
    while start < len(kind_list):
        kind, stop = kind_list[start], start
        while (
            stop < len(kind_list) and kind_list[stop] == kind and (not kind or number_list[stop] == number_list[start])
        ):
            stop += 1
        if kind == 0:
            segments.append(Segment("text", (stop - start, 1, 1)))
        else:
            form = "image" if int(ids[start]) == image_id else "video"
            t, h, w = next(grids[form])
            visuals.append(Visual(form, (t, h // MERGE, w // MERGE)))  # type: ignore[arg-type]
            segments.append(Segment("source" if kind == 2 else "target", visuals[-1].grid))
        start = stop
    return Conversation(ids, SegmentLayout(segments), tuple(visuals))
