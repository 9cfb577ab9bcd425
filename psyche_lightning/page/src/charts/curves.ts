/** Curves of a run's figures: what is drawn, before it is drawn. */

import type { Row } from "../model";

export interface Curve {
  label: string;
  /** The name of a colour of the style. */
  tone: string;
  points: [x: number, y: number][];
  /** Draw a mark at each value: there are few, with gaps between them. */
  sparse?: boolean;
}

export type Axis = "step" | "time";

/**
 * All rows in the order of their steps, older ones as means of several. After `psyche run restart-from`, steps are
 * trained again: the newest row of a step counts.
 */
export function trained(past: Row[], metrics: Row[]): Row[] {
  const kept: Row[] = [];
  let next = Infinity;
  for (const rows of [metrics, past]) {
    for (let i = rows.length - 1; i >= 0; i--) {
      const row = rows[i]!;
      if (row.step > 0 && row.step < next) {
        kept.push(row);
        next = row.first_step ?? row.step;
      }
    }
  }
  return kept.reverse();
}

export function curve(rows: Row[], axis: Axis, value: (row: Row) => number | null | undefined): [number, number][] {
  const points: [number, number][] = [];
  for (const row of rows) {
    const y = value(row);
    if (y != null && Number.isFinite(y)) points.push([axis === "step" ? row.step : row.time, y]);
  }
  return points;
}

/** An exponential mean that does not lean towards its first value. */
export function smoothed(points: [number, number][], weight: number): [number, number][] {
  let sum = 0;
  let norm = 0;
  return points.map(([x, y]) => {
    sum = weight * sum + (1 - weight) * y;
    norm = weight * norm + (1 - weight);
    return [x, sum / norm];
  });
}

/** Curves on one axis: its places, and the values of each curve at them (null where it has none). */
export function aligned(curves: [number, number][][]): [number[], ...(number | null)[][]] {
  const places = [...new Set(curves.flatMap(points => points.map(([x]) => x)))].sort((a, b) => a - b);
  const index = new Map(places.map((x, i) => [x, i]));
  const values = curves.map(points => {
    const row: (number | null)[] = new Array(places.length).fill(null);
    for (const [x, y] of points) row[index.get(x)!] = y;
    return row;
  });
  return [places, ...values];
}

/**
 * The largest value that is worth the height of a chart; null if all are. One round that an outage made a hundred times
 * as long would else press all others flat.
 */
export function worth(points: [number, number][]): number | null {
  const values = points.map(([, y]) => y).sort((a, b) => a - b);
  const usual = values[Math.floor(0.98 * values.length)] ?? 0;
  return usual > 0 && values.at(-1)! > 5 * usual ? 1.5 * usual : null;
}

/** Names before the slash belong together: norm/0 and norm/1. */
export function families(rows: Row[]): Map<string, string[]> {
  const found = new Map<string, Set<string>>();
  for (const row of rows) {
    for (const name of Object.keys(row.figures ?? {})) {
      const family = name.split("/")[0]!;
      found.set(family, (found.get(family) ?? new Set()).add(name));
    }
  }
  return new Map([...found].map(([family, names]) => [family, [...names].sort()]));
}
