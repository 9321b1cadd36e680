"""The picture of a training: losses over the tokens trained on."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from trimtab.report.figures import HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, Dimension, _grid, _tag, _text

_TOKENS = Dimension("tokens trained on", less_is_better=False)
_LOSS = Dimension("loss in nats a token", less_is_better=True)


def loss_curve(train: Sequence[Sequence[float]], heldout: Sequence[Sequence[float]]) -> Markup:
    """Returns the training loss as a line and the held-out loss as a line through its measurements.

    Args:
        train, heldout: (tokens, loss in nats a token), by tokens.
    """
    if not train or not heldout:
        return Markup("")
    across = Axis([0.0, *(tokens for tokens, _ in (*train, *heldout))], LEFT, WIDTH - RIGHT, margin=0.03)
    up = Axis([loss for _, loss in (*train, *heldout)], HEIGHT - 48, TOP, positive=True)
    parts = [_grid(across, up, _TOKENS, _LOSS, arrow=False)]
    for points, css in ((train, "curve train"), (heldout, "curve heldout")):
        path = "L".join(f"{across(tokens):.1f} {up(loss):.1f}" for tokens, loss in points)
        parts.append(_tag("path", d=f"M{path}", class_=css))
    for tokens, loss in heldout:
        told = _tag("title", f"held-out loss {loss:.4f} after {tokens:,.0f} tokens")
        parts.append(_tag("circle", told, cx=across(tokens), cy=up(loss), r=3.5, class_="estimate"))
    for place, (name, css) in enumerate((("held out", "curve heldout"), ("training", "curve train"))):
        middle = TOP + 12 + 18 * place
        parts.append(_tag("path", d=f"M{WIDTH - 110} {middle}h22", class_=css))
        parts.append(_text(name, WIDTH - 82, middle + 4, "label"))
    words = f"distillation loss: held out {heldout[0][1]:.4f} before and {heldout[-1][1]:.4f} after"
    return _tag("svg", Markup("").join(parts), viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=words)
