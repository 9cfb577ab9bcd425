/** Numbers, sizes and dates as people read them. An unknown value is a dash. */

type Maybe<T> = T | null | undefined;

const DASH = "–";

function scaled(value: number, units: [number, string][]): string {
  for (const [size, unit] of units) {
    if (Math.abs(value) >= size) {
      const number = value / size;
      return `${number.toFixed(Math.abs(number) >= 99.95 ? 0 : Math.abs(number) >= 9.995 ? 1 : 2)} ${unit}`;
    }
  }
  return value === Math.round(value) ? String(value) : figure(value);
}

/** A count in full below 100,000, then in short. */
export const count = (value: Maybe<number>): string =>
  value == null ? DASH
  : Math.abs(value) < 1e5 ? Math.round(value).toLocaleString("en")
  : scaled(value, [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]);

/** A number in short from 10,000 on, else with three significant digits. */
export const short = (value: Maybe<number>): string =>
  value == null ? DASH
  : Math.abs(value) < 1e4 ? (Math.abs(value) < 100 ? figure(value) : count(value))
  : scaled(value, [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]);

export const bytes = (value: Maybe<number>): string =>
  value == null ? DASH
  : value < 1e3 ? `${Math.round(value)} B`
  : scaled(value, [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]);

export const rate = (value: Maybe<number>): string => (value == null ? DASH : `${bytes(value)}/s`);

export const loss = (value: Maybe<number>): string => (value == null ? DASH : value.toFixed(4));

export const percent = (value: Maybe<number>, digits = 0): string =>
  value == null ? DASH : `${(100 * value).toFixed(digits)} %`;

/** Three significant digits. */
export function figure(value: Maybe<number>): string {
  if (value == null) return DASH;
  const size = Math.abs(value);
  return value === 0 || (size >= 1e-3 && size < 1e5) ? String(Number(value.toPrecision(3))) : value.toExponential(1);
}

/** A length of time: `340 ms`, `4.2 s`, `3 min 20 s`, `5 h 12 min`, `3 d 4 h`. */
export function lasting(seconds: Maybe<number>): string {
  if (seconds == null) return DASH;
  const s = Math.max(0, seconds);
  if (s < 1) return `${Math.round(1000 * s)} ms`;
  if (s < 10) return `${s.toFixed(1)} s`;
  const whole = Math.round(s);
  if (whole < 60) return `${whole} s`;
  const pairs: [number, string, number, string][] = [[86400, "d", 3600, "h"], [3600, "h", 60, "min"], [60, "min", 1, "s"]];
  for (const [large, first, small, second] of pairs) {
    if (whole >= large) {
      const rest = Math.floor((whole % large) / small);
      return `${Math.floor(whole / large)} ${first}${rest ? ` ${rest} ${second}` : ""}`;
    }
  }
  return DASH;
}

/** A length of time in one unit, for an axis. */
export function span(seconds: number): string {
  const s = Math.abs(seconds);
  return s >= 7200 ? `${figure(seconds / 3600)} h` : s >= 120 ? `${figure(seconds / 60)} min` : s >= 1 || s === 0 ? `${figure(seconds)} s` : `${figure(1000 * seconds)} ms`;
}

/** A countdown: `0:07`, `12:30`, `2:03:10`. */
export function clock(seconds: number): string {
  const s = Math.max(0, Math.ceil(seconds));
  const two = (n: number) => String(n).padStart(2, "0");
  return s < 3600 ? `${Math.floor(s / 60)}:${two(s % 60)}` : `${Math.floor(s / 3600)}:${two(Math.floor((s % 3600) / 60))}:${two(s % 60)}`;
}

export const date = (seconds: number, options: Intl.DateTimeFormatOptions): string =>
  new Date(1000 * seconds).toLocaleString("en-GB", options);

export const time = (seconds: number): string => date(seconds, { hour: "2-digit", minute: "2-digit", second: "2-digit" });

export const day = (seconds: number): string =>
  date(seconds, { weekday: "long", day: "numeric", month: "long", year: "numeric" });

export const moment = (seconds: Maybe<number>): string =>
  seconds == null ? DASH : date(seconds, { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" });

export const iso = (seconds: number): string => new Date(1000 * seconds).toISOString();

export const counted = (number: number, one: string, many = `${one}s`): string =>
  `${count(number)} ${number === 1 ? one : many}`;

export const words = (name: string): string => name.replaceAll("_", " ");

export const capital = (text: string): string => text.charAt(0).toUpperCase() + text.slice(1);

export const brief = (signer: string): string => signer.slice(0, 8);
