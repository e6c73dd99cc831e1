"""The tree as a picture (SVG)."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from snaptree.machines.report import frees, moment, nodes, saying
from snaptree.model.snapshot import Snapshot

if TYPE_CHECKING:
    from snaptree.machines.machine import View

ROW, STEP, LEFT, TOP = 34, 26, 28, 64
_STYLE = (
    "text{font-family:system-ui,sans-serif;font-size:14px;fill:#1f2933}.name{font-weight:600}.note{fill:#66788a;"
    "font-size:12px}.line{stroke:#9fb3c8;stroke-width:2;fill:none}.snapshot{fill:#2f6fed}.branch{fill:#fff;stroke:"
    "#2f6fed;stroke-width:2}.active{fill:#1f9d55;stroke:#1f9d55}.here{fill:#1f9d55;font-weight:600}.sick{fill:#c53030}"
)


def svg_of(view: View) -> str:
    """The tree as SVG text: snapshots as discs, branches as rings, forks to the right."""
    tree = view.tree
    freed = frees(view)
    rows = list(nodes(tree))
    place = {node.named.name: (LEFT + STEP * (len(node.lead) // 2), TOP + ROW * at) for at, node in enumerate(rows)}
    lines: list[str] = []
    marks: list[str] = []
    for node in rows:
        named = node.named
        x, y = place[named.name]
        if named.parent in place:
            px, py = place[named.parent]
            if px == x:
                lines.append(f'<path class="line" d="M{px} {py}V{y}"/>')
            else:
                lines.append(f'<path class="line" d="M{px} {py}V{y - 10}Q{px} {y} {px + 10} {y}H{x}"/>')
        active = named.name == tree.active
        kind = "snapshot" if isinstance(named, Snapshot) else "branch"
        marks.append(f'<circle class="{kind}{" active" if active else ""}" cx="{x}" cy="{y}" r="7"/>')
        room = saying(freed[named.name])
        if isinstance(named, Snapshot):
            tail = f'<tspan class="note" dx="10">{moment(named.created)} · {room}</tspan>'
        elif active:
            tail = '<tspan class="here" dx="10">you are here</tspan>'
        else:
            tail = f'<tspan class="note" dx="10">parked · {room}</tspan>'
        marks.append(f'<text x="{x + 16}" y="{y + 5}"><tspan class="name">{escape(named.name)}</tspan>{tail}</text>')
    below = TOP + ROW * len(rows)
    remarks = [each.detail for each in view.ailments.values() if each.blocks] + list(view.pending)
    for number, remark in enumerate(remarks):
        marks.append(f'<text class="note sick" x="{LEFT}" y="{below + 20 * number}">{escape(remark)}</text>')
    deepest = max((x for x, _ in place.values()), default=LEFT)
    longest = max((len(node.named.name) for node in rows), default=10)
    width = max(deepest + 16 + 9 * longest + 300, LEFT + 7 * max((len(each) for each in remarks), default=0))
    height = below + 20 * len(remarks) + 10
    head = f"{tree.machine} · {', '.join(tree.disks)} · {view.state}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f'<style>{_STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="{LEFT - 8}" y="30" class="name" style="font-size:17px">{escape(head)}</text>'
        + "".join(lines)
        + "".join(marks)
        + "</svg>\n"
    )
