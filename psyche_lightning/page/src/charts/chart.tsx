/** A chart: one or more curves over steps or time, with values at the pointer, zoom, and keys for all of it. */

import type { ComponentChildren } from "preact";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";
import * as format from "../format";
import { onTheme, tone } from "../theme";
import { aligned, smoothed, worth, type Axis, type Curve } from "./curves";

export interface View {
  axis: Axis;
  /** Weight of the past in the drawn mean, from 0 to below 1. */
  smoothing: number;
  /** The part that is shown; null for all. */
  range: [number, number] | null;
  onRange: (range: [number, number] | null) => void;
  /** Names of the curves that are switched off, in all charts. */
  hidden: ReadonlySet<string>;
  onHide: (label: string) => void;
}

interface Props extends View {
  title: string;
  curves: Curve[];
  /** A value in words. */
  text: (value: number) => string;
  height?: number;
  log?: boolean;
  /** Draw each curve on top of the one before; values stay their own. */
  stacked?: boolean;
  /** A value at the axis, if `text` is too long there. */
  tick?: (value: number) => string;
  /** Let the axis of values begin at 0. */
  fromZero?: boolean;
  /** Let few values that are far above all others lie outside, and say how many. */
  cuts?: boolean;
  /** Write values at the axis as plain numbers, with the digits that tell them apart. */
  plain?: boolean;
  empty?: string;
  id?: string;
  children?: ComponentChildren;
}

const SHARED = "psyche"; // all charts show their values of the step under the pointer

export function Chart(props: Props) {
  const { title, axis, smoothing, range, text, log, stacked, fromZero, hidden, height = 150 } = props;
  const curves = useMemo(() => props.curves.filter(one => props.curves.length === 1 || !hidden.has(one.label)), [props.curves, hidden]);
  const holder = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const latest = useRef<Props & { most?: number | null }>(props);
  const [at, setAt] = useState<number | null>(null);

  const data = useMemo(() => {
    const raw = aligned(curves.map(one => one.points));
    const [places, ...values] = raw;
    if (stacked) {
      const sums: number[] = new Array(places.length).fill(0);
      const tops = values.map(row => row.map((value, i) => (value === null ? null : (sums[i] = sums[i]! + value))));
      return { places, values, drawn: [places, ...tops.reverse()] };
    }
    if (!smoothing) return { places, values, drawn: raw };
    const means = aligned(curves.map(one => (one.sparse ? one.points : smoothed(one.points, smoothing)))).slice(1);
    return { places, values, drawn: [places, ...values, ...means] };
  }, [curves, smoothing, stacked]);
  const most = useMemo(() => (props.cuts && !log ? worth(curves.flatMap(one => one.points)) : null), [props.cuts, log, curves]);
  const outside = most === null ? 0 : curves.flatMap(one => one.points).filter(([, y]) => y > most).length;
  const enough = curves.some(one => one.points.length > 1);
  latest.current = { ...props, most };
  const form = JSON.stringify([enough, axis, log, most !== null, stacked, fromZero, smoothing > 0, curves.map(one => [one.label, one.tone, one.sparse])]);

  useEffect(() => {
    const element = holder.current;
    if (!element || !enough) return;
    const made = new uPlot(options(element.clientWidth, height, curves, latest, setAt), data.drawn as uPlot.AlignedData, element);
    plot.current = made;
    Object.assign(element, { uplot: made }); // for those who look closer, in a browser's console and in tests
    const sized = new ResizeObserver(() => made.setSize({ width: element.clientWidth, height }));
    sized.observe(element);
    const unwatch = onTheme(() => made.redraw(false));
    return () => {
      sized.disconnect();
      unwatch();
      made.destroy();
      plot.current = null;
    };
  }, [form, height]);

  useEffect(() => {
    plot.current?.setData(data.drawn as uPlot.AlignedData);
  }, [data, range?.[0], range?.[1]]);

  const place = at === null ? null : data.places[Math.min(at, data.places.length - 1)] ?? null;
  const end = place === null ? data.places.length - 1 : Math.min(at!, data.places.length - 1);
  const where = (x: number) => (axis === "step" ? `step ${format.count(x)}` : format.moment(x));
  const valueOf = (i: number) => {
    if (i < 0) return "off";
    for (let k = end; k >= 0; k--) {
      const value = data.values[i]?.[k];
      if (value != null) return text(value);
    }
    return "–";
  };
  const said = curves.map((one, i) => `${one.label} ${valueOf(i)}`).join(", ");

  function move(event: KeyboardEvent) {
    const places = data.places;
    const shown = plot.current;
    if (!shown || !places.length || event.ctrlKey || event.metaKey || event.altKey) return;
    const here = at ?? places.length - 1;
    const far = Math.max(1, Math.round(places.length / 20));
    const moves: Record<string, number> = {
      ArrowLeft: here - 1, ArrowRight: here + 1, ArrowDown: here - 1, ArrowUp: here + 1,
      PageDown: here - far, PageUp: here + far, Home: 0, End: places.length - 1,
    };
    const [low, high] = [shown.scales.x!.min!, shown.scales.x!.max!];
    if (event.key in moves) {
      const next = Math.max(0, Math.min(places.length - 1, moves[event.key]!));
      shown.setCursor({ left: shown.valToPos(places[next]!, "x"), top: shown.over.clientHeight / 2 });
      setAt(next);
    } else if (event.key === "+" || event.key === "-") {
      const middle = places[here]!;
      const half = ((high - low) / 2) * (event.key === "+" ? 0.5 : 2);
      const [first, last] = [places[0]!, places.at(-1)!];
      const zoomed: [number, number] = [Math.max(first, middle - half), Math.min(last, middle + half)];
      props.onRange(zoomed[0] <= first && zoomed[1] >= last ? null : zoomed);
    } else if (event.key === "Escape") {
      props.onRange(null);
    } else {
      return;
    }
    event.preventDefault();
  }

  return (
    <figure class="chart" id={props.id}>
      <figcaption>
        <h2>{title}</h2>
        {props.children}
        <div class="readout">
          {props.curves.length === 1
            ? <span class="value"><b>{curves[0]!.points.length ? valueOf(0) : "–"}</b></span>
            : props.curves.map(one => (
              <button key={one.label} type="button" class="value" aria-pressed={curves.includes(one)} title="Switch the curve on or off" onClick={() => props.onHide(one.label)}>
                <i class="key" style={{ color: `var(--${one.tone})` }} />
                <span class="soft">{one.label}</span> <b>{valueOf(curves.indexOf(one))}</b>
              </button>
            ))}
          {outside > 0 && place === null && <span class="soft">{format.counted(outside, "value")} above {text(most!)}</span>}
          {place !== null && enough && <span class="soft where">{where(place)}</span>}
        </div>
      </figcaption>
      {enough ? (
        <div
          class="plot"
          ref={holder}
          style={{ height: `${height}px` }}
          role="slider"
          tabIndex={0}
          aria-label={`${title}, by ${axis}. Arrow keys read values, plus and minus zoom, Escape shows all.`}
          aria-valuemin={0}
          aria-valuemax={data.places.length - 1}
          aria-valuenow={end}
          aria-valuetext={`${where(data.places[end]!)}: ${said}`}
          onKeyDown={move}
          onBlur={() => setAt(null)}
          onDblClick={() => props.onRange(null)}
        />
      ) : (
        <p class="plot empty" style={{ height: `${height}px` }}>{props.empty ?? "The curve begins with the second value."}</p>
      )}
    </figure>
  );
}

function options(width: number, height: number, curves: Curve[], latest: { current: Props & { most?: number | null } }, setAt: (at: number | null) => void): uPlot.Options {
  const { axis, log, stacked, smoothing, fromZero, plain } = latest.current;
  const line = (one: Curve, faint: boolean): uPlot.Series => ({
    label: one.label,
    scale: "y",
    stroke: () => (faint ? faded(tone(one.tone), 0.28) : tone(one.tone)),
    width: faint ? 1 : 1.6,
    spanGaps: true,
    points: { show: Boolean(one.sparse) && !faint, size: 5, fill: () => tone(one.tone) },
    ...(stacked && { fill: () => tone(one.tone), width: 0 }),
  });
  const lines = stacked ? [...curves].reverse().map(one => line(one, false))
    : smoothing > 0 ? [...curves.map(one => line(one, true)), ...curves.map(one => line(one, false))]
    : curves.map(one => line(one, false));
  const ink: Partial<uPlot.Axis> = {
    stroke: () => tone("soft"),
    font: "11px system-ui, sans-serif",
    grid: { stroke: () => tone("line"), width: 1 },
    ticks: { show: false },
  };
  return {
    width,
    height,
    padding: [10, 18, 0, 0], // half a label of the last place
    legend: { show: false },
    scales: {
      x: {
        time: axis === "time",
        range: (_, low, high) => {
          const [from, to] = latest.current.range ?? [low, high];
          return from === to ? [from - 1, to + 1] : [from, to];
        },
      },
      y: {
        distr: log ? 3 : 1,
        range: (_, low, high) => {
          if (low === null || high === null) return [0, 1];
          if (log) return [low * 0.97, high * 1.03];
          const { most } = latest.current;
          if (most != null && low <= most) high = Math.min(high, most);
          const room = (high - low || Math.abs(high) || 1) * 0.06;
          return fromZero || stacked ? [0, high + room || 1] : [low - room, high + room];
        },
      },
    },
    series: [{}, ...lines],
    axes: [
      {
        ...ink,
        size: 26,
        space: 70,
        ...(axis === "time" && { values: (_: uPlot, places: number[]) => dates(places) }),
        ...(axis === "step" && {
          incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6, 2e6, 5e6, 1e7],
          values: (_: uPlot, places: number[]) => places.map(x => format.count(x)),
        }),
      },
      {
        ...ink,
        size: 54,
        space: height > 200 ? 36 : 26,
        values: (_, values, __, ___, step) => values.map(value => (value === null ? "" : plain && !log ? value.toFixed(Math.max(0, -Math.floor(Math.log10(step)))) : (latest.current.tick ?? latest.current.text)(value))),
        ...(log && { splits: (_: uPlot, __: number, low: number, high: number) => rounded(low, high), filter: (_: uPlot, all: number[]) => all }),
      },
    ],
    cursor: {
      sync: { key: SHARED, setSeries: false },
      drag: { x: true, y: false, setScale: false, dist: 6 },
      points: { size: 7, width: 1.5, fill: () => tone("paper") },
      y: false,
    },
    hooks: {
      setCursor: [plot => setAt(plot.cursor.left! >= 0 ? plot.cursor.idx ?? null : null)],
      setSelect: [
        plot => {
          if (plot.select.width < 6) return;
          const from = plot.posToVal(plot.select.left, "x");
          const to = plot.posToVal(plot.select.left + plot.select.width, "x");
          plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
          latest.current.onRange([from, to]);
        },
      ],
    },
  };
}

/** A few round values between two, for an axis of logarithms: as round as three of them allow. */
function rounded(low: number, high: number): number[] {
  const between = (parts: number[]) => {
    const found: number[] = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      found.push(...parts.map(part => Number((part * 10 ** power).toPrecision(6))).filter(value => value >= low && value <= high));
    }
    return found;
  };
  const even = (steps: number) => Array.from({ length: 9 * steps }, (_, i) => 1 + i / steps);
  for (const parts of [[1], [1, 2, 5], even(1), even(5), even(20), even(100)]) {
    const found = between(parts);
    if (found.length < 3) continue;
    const apart = Math.ceil(found.length / 6);
    return found.filter((_, i) => i % apart === 0);
  }
  return [low, high];
}

/** Times of the day, and the date where a new day begins. */
function dates(places: number[]): string[] {
  const days = places.map(place => format.date(place, { day: "numeric", month: "short" }));
  const spans = places.length > 1 ? places[1]! - places[0]! : 0;
  return places.map((place, i) => (spans >= 86_400 ? days[i]! : i > 0 && days[i] !== days[i - 1] ? days[i]! : spans < 60 ? format.time(place) : format.date(place, { hour: "2-digit", minute: "2-digit" })));
}

const faded = (colour: string, alpha: number): string => colour.replace(/^rgb\((.*)\)$/, `rgba($1, ${alpha})`);
