/** Small parts that several views share. */

import { createContext, type ComponentChildren } from "preact";
import { useContext, useEffect, useState } from "preact/hooks";
import type { Feed } from "./feed";
import * as format from "./format";

export const Clock = createContext<Feed | null>(null);

/** The coordinator's date in seconds, each second anew. */
export function useNow(): number {
  const feed = useContext(Clock)!;
  const [now, setNow] = useState(feed.now());
  useEffect(() => {
    const timer = setInterval(() => setNow(feed.now()), 1000);
    return () => clearInterval(timer);
  }, [feed]);
  return now;
}

/** A word for a state, with its colour. */
export function Tag({ state, children }: { state: string; children?: ComponentChildren }) {
  return <span class={`tag ${state}`}>{children ?? format.words(state)}</span>;
}

export function Ago({ time }: { time: number | null | undefined }) {
  const now = useNow();
  if (time == null) return <>–</>;
  const past = Math.floor(now - time);
  return <time dateTime={format.iso(time)} title={format.iso(time)}>{past < 1 ? "just now" : `${format.lasting(past)} ago`}</time>;
}

export function Moment({ time }: { time: number | null | undefined }) {
  return time == null ? <>–</> : <time dateTime={format.iso(time)} title={format.iso(time)}>{format.moment(time)}</time>;
}

export function Bar({ value, label }: { value: number | null; label: string }) {
  return (
    <div class="bar" role="progressbar" aria-label={label} aria-valuemin={0} aria-valuemax={100} aria-valuenow={value === null ? undefined : Math.round(100 * value)}>
      <i style={{ width: `${100 * (value ?? 0)}%` }} />
    </div>
  );
}

export function Figure({ label, value, note }: { label: ComponentChildren; value: ComponentChildren; note?: ComponentChildren }) {
  return (
    <div class="figure">
      <dt>{label}</dt>
      <dd><b>{value}</b>{note != null && <span class="soft">{note}</span>}</dd>
    </div>
  );
}

/** Buttons of which one is pressed. */
export function Choice<T extends string>({ label, value, choices, onChange }: { label: string; value: T; choices: [T, string][]; onChange: (value: T) => void }) {
  return (
    <div class="choice" role="group" aria-label={label}>
      {choices.map(([one, text]) => (
        <button key={one} type="button" aria-pressed={one === value} onClick={() => onChange(one)}>{text}</button>
      ))}
    </div>
  );
}
