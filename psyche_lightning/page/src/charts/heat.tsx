/** The matrix of nodes by rounds: what each node delivered. Marks differ in form as well as in colour. */

import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import * as format from "../format";
import type { Delivery } from "../model";
import { link } from "../route";
import { onTheme, tone } from "../theme";

export const MARKS: Record<string, { name: string; tone: string }> = {
  d: { name: "delivered", tone: "cell" },
  l: { name: "late", tone: "warn" },
  a: { name: "absent", tone: "bad" },
  x: { name: "excluded", tone: "c3" },
  r: { name: "rested", tone: "line-strong" },
  ".": { name: "open", tone: "soft" },
};
const ROW = 18;
const TOP = 18;

interface Props {
  run: string;
  rounds: Delivery[];
  numbers: Record<string, string>;
  /** The one node that is shown; all by default. */
  only?: string;
}

export function Heat({ run, rounds, numbers, only }: Props) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const scroller = useRef<HTMLDivElement>(null);
  const [width, setWidth] = useState(0);
  const [at, setAt] = useState<[row: number, column: number] | null>(null);

  const { signers, cells } = useMemo(() => {
    const place = new Map<string, number>();
    const marks = rounds.map(round => new Map(round.nodes.map((number, i) => [numbers[number] ?? `#${number}`, round.marks[i] ?? "."])));
    for (const [number, signer] of Object.entries(numbers)) if (!only || signer === only) place.set(signer, Number(number));
    const seen = new Set(marks.flatMap(one => [...one.keys()]));
    const signers = [...seen].filter(signer => !only || signer === only).sort((a, b) => (place.get(a) ?? 0) - (place.get(b) ?? 0));
    return { signers, cells: signers.map(signer => marks.map(one => one.get(signer) ?? " ")) };
  }, [rounds, numbers, only]);

  const cell = Math.max(5, Math.min(16, Math.floor(width / Math.max(1, rounds.length))));
  const across = Math.max(cell * rounds.length, 1);
  const down = TOP + ROW * signers.length;

  useEffect(() => {
    const element = scroller.current;
    if (!element) return;
    const sized = new ResizeObserver(() => setWidth(element.clientWidth));
    sized.observe(element);
    return () => sized.disconnect();
  }, [signers.length > 0]);

  useEffect(() => {
    const element = scroller.current;
    if (element) element.scrollLeft = element.scrollWidth; // the newest rounds
  }, [rounds.length, cell]);

  useEffect(() => {
    const draw = () => {
      const element = canvas.current;
      const pen = element?.getContext("2d");
      if (!element || !pen) return;
      const dense = devicePixelRatio || 1;
      element.width = across * dense;
      element.height = down * dense;
      pen.scale(dense, dense);
      pen.clearRect(0, 0, across, down);
      pen.font = "11px system-ui, sans-serif";
      let named = -Infinity;
      rounds.forEach((round, column) => {
        if (column > 0 && rounds[column - 1]!.epoch === round.epoch) return;
        const x = column * cell;
        pen.fillStyle = tone("line-strong");
        pen.fillRect(x, 0, 1, down);
        if (x < named) return;
        const text = `epoch ${round.epoch}`;
        pen.fillStyle = tone("soft");
        pen.fillText(text, x + 4, 11);
        named = x + pen.measureText(text).width + 12;
      });
      cells.forEach((marks, row) => marks.forEach((mark, column) => paint(pen, mark, column * cell, TOP + row * ROW, cell)));
      if (at) {
        pen.strokeStyle = tone("ink");
        pen.lineWidth = 1.5;
        pen.strokeRect(at[1] * cell - 0.5, TOP + at[0] * ROW + 0.5, cell, ROW - 2);
      }
    };
    draw();
    return onTheme(draw);
  }, [cells, rounds, across, down, at, cell]);

  if (!signers.length) return <p class="empty">The matrix begins with the first round.</p>;

  const told = (row: number, column: number) => {
    const round = rounds[column];
    if (!round) return "";
    const mark = MARKS[cells[row]![column]!];
    const where = round.step ? `step ${format.count(round.step)}` : "drain";
    return `${format.brief(signers[row]!)}: ${mark?.name ?? "not a member"} · ${where}, round ${round.height} of epoch ${round.epoch} · ${format.moment(round.time)}${round.decided === false && mark?.name !== "open" ? " · not decided" : ""}`;
  };

  function point(event: PointerEvent) {
    const box = canvas.current!.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / cell);
    const row = Math.floor((event.clientY - box.top - TOP) / ROW);
    setAt(row >= 0 && row < signers.length && column >= 0 && column < rounds.length ? [row, column] : null);
  }

  function move(event: KeyboardEvent) {
    const [row, column] = at ?? [0, rounds.length];
    const moves: Record<string, [number, number]> = {
      ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1], ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
      Home: [row, 0], End: [row, rounds.length - 1],
    };
    const next = moves[event.key];
    if (!next) return;
    event.preventDefault();
    const to = Math.max(0, Math.min(rounds.length - 1, next[1]));
    setAt([Math.max(0, Math.min(signers.length - 1, next[0])), to]);
    const element = scroller.current!;
    if (to * cell < element.scrollLeft) element.scrollLeft = to * cell;
    else if ((to + 1) * cell > element.scrollLeft + element.clientWidth) element.scrollLeft = (to + 1) * cell - element.clientWidth;
  }

  const summary = signers.map((signer, row) => {
    const counts = Object.entries(MARKS).map(([mark, { name }]) => [cells[row]!.filter(one => one === mark).length, name] as const);
    return `${format.brief(signer)} ${counts.filter(([n]) => n).map(([n, name]) => `${n} ${name}`).join(", ")}`;
  });

  return (
    <div class="heat">
      <div class="heat-grid">
        {!only && (
          <ol class="heat-names" style={{ paddingTop: `${TOP}px` }}>
            {signers.map(signer => (
              <li key={signer}><a href={link(run, "nodes", signer)}><code>{format.brief(signer)}</code></a></li>
            ))}
          </ol>
        )}
        <div
          class="heat-scroll"
          ref={scroller}
          role="slider"
          tabIndex={0}
          aria-label={`Rounds of ${only ? "this node" : "all nodes"}; arrow keys go through them. ${summary.join("; ")}`}
          aria-valuemin={0}
          aria-valuemax={Math.max(0, rounds.length - 1)}
          aria-valuenow={at?.[1] ?? rounds.length - 1}
          aria-valuetext={at ? told(...at) : "no round chosen"}
          onKeyDown={move}
          onBlur={() => setAt(null)}
        >
          <canvas ref={canvas} style={{ width: `${across}px`, height: `${down}px` }} onPointerMove={point} onPointerLeave={() => setAt(null)} />
        </div>
      </div>
      <p class="legend">
        {at && cells[at[0]] ? <span class="told">{told(...at)}</span> : Object.entries(MARKS).filter(([mark]) => mark !== "." || cells.some(row => row.includes("."))).map(([mark, { name }]) => <span key={mark}><Swatch mark={mark} /> {name}</span>)}
      </p>
    </div>
  );
}

function Swatch({ mark }: { mark: string }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  useEffect(() => {
    const draw = () => {
      const pen = canvas.current?.getContext("2d");
      if (!pen) return;
      pen.clearRect(0, 0, 32, 36);
      pen.setTransform(2, 0, 0, 2, 0, 0);
      paint(pen, mark, 0, 0, 13);
    };
    draw();
    return onTheme(draw);
  }, [mark]);
  return <canvas ref={canvas} width={26} height={34} class="swatch" aria-hidden="true" />;
}

/** One cell: full if delivered, half if late, hollow if absent, crossed if excluded, a line if it rested, a dot while open. */
function paint(pen: CanvasRenderingContext2D, mark: string, x: number, y: number, size: number): void {
  const kind = MARKS[mark];
  if (!kind) return;
  const [left, top, width, height] = [x + 0.5, y + 1.5, Math.max(1, size - (size > 6 ? 2 : 1)), ROW - 4];
  pen.fillStyle = pen.strokeStyle = tone(kind.tone);
  pen.lineWidth = 1;
  if (mark === "d") pen.fillRect(left, top, width, height);
  else if (mark === "l") pen.fillRect(left, top + height / 2, width, height / 2);
  else if (mark === "a") pen.strokeRect(left + 0.5, top + 0.5, width - 1, height - 1);
  else if (mark === "r") pen.fillRect(left, top + height - 2, width, 2);
  else if (mark === ".") pen.fillRect(left + width / 2 - 1, top + height / 2 - 1, 2, 2);
  else {
    pen.globalAlpha = 0.25;
    pen.fillRect(left, top, width, height);
    pen.globalAlpha = 1;
    pen.beginPath();
    pen.moveTo(left, top);
    pen.lineTo(left + width, top + height);
    pen.moveTo(left + width, top);
    pen.lineTo(left, top + height);
    pen.stroke();
  }
}
