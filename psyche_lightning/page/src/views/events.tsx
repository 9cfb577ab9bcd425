/** What happened to a run, newest first: with dates, a filter by kind, a search, and a link to each event. */

import { Fragment } from "preact";
import { useEffect } from "preact/hooks";
import * as format from "../format";
import type { Event, Run } from "../model";
import { link, setOptions } from "../route";

const SHOWN = 200;
const GRAVE = new Set(["dropped", "ejected"]);
const NOTED = new Set(["late", "absent"]);

/** The events of one node alone, with `signer`. */
export function Events({ run, id, options, signer }: { run: Run; id: string; options: URLSearchParams; signer?: string }) {
  const mine = signer ? run.events.filter(event => event.signer === signer) : run.events;
  const chosen = new Set((options.get("kind") ?? "").split(",").filter(Boolean));
  const wanted = options.get("search") ?? "";
  const marked = options.get("event");
  const limit = Number(options.get("limit")) || SHOWN;
  const kinds = [...new Set(mine.map(event => event.kind))].sort();
  const found = mine
    .filter(event => !chosen.size || chosen.has(event.kind))
    .filter(event => `${event.text} ${event.signer ?? ""} ${event.kind}`.toLowerCase().includes(wanted.toLowerCase()))
    .reverse();
  const shown = found.slice(0, limit);

  useEffect(() => {
    if (marked) document.getElementById(`event-${marked}`)?.scrollIntoView({ block: "center" });
  }, [marked, run.events.length > 0]);

  const toggle = (kind: string) => {
    const next = new Set(chosen);
    if (!next.delete(kind)) next.add(kind);
    setOptions({ kind: [...next].join(",") });
  };
  let before = "";
  return (
    <section>
      <div class="toolbar">
        <input type="search" aria-label="Search events" placeholder="Search" value={wanted} onInput={event => setOptions({ search: event.currentTarget.value })} />
        {kinds.length > 1 && (
          <div class="kinds" role="group" aria-label="Kinds of events">
            {kinds.map(kind => <button key={kind} type="button" class="plain" aria-pressed={chosen.has(kind)} onClick={() => toggle(kind)}>{format.words(kind)}</button>)}
          </div>
        )}
        <span class="soft" role="status">{format.counted(found.length, "event")}</span>
      </div>
      {found.length === 0 && <p class="empty">{mine.length ? "No event fits." : "Nothing has happened yet."}</p>}
      <div class="days">
        {shown.map((event, i) => {
          const day = format.day(event.time);
          const heading = day !== before && <h2 class="day">{day}</h2>;
          before = day;
          const number = event.number;
          return (
            <Fragment key={number ?? `${event.time}-${i}`}>
              {heading}
              <EventLine event={event} id={id} own={Boolean(signer)} marked={number !== undefined && String(number) === marked} />
            </Fragment>
          );
        })}
      </div>
      {found.length > limit && <button type="button" class="plain" onClick={() => setOptions({ limit: String(limit + SHOWN) })}>Show {Math.min(SHOWN, found.length - limit)} older</button>}
    </section>
  );
}

export function EventLine({ event, id, short, own, marked }: { event: Event; id: string; short?: boolean; own?: boolean; marked?: boolean }) {
  const kind = GRAVE.has(event.kind) || (event.kind === "digest" && event.text.includes("differ")) ? "bad" : NOTED.has(event.kind) ? "warn" : "soft";
  const when = <time dateTime={format.iso(event.time)} title={format.iso(event.time)}>{short ? format.moment(event.time) : format.time(event.time)}</time>;
  const Line = short ? "li" : "div";
  return (
    <Line class={`event${marked ? " marked" : ""}`} id={!short && event.number !== undefined ? `event-${event.number}` : undefined}>
      {!short && event.number !== undefined ? <a class="when" href={link(id, "events", null, { event: String(event.number) })} title="Link to this event">{when}</a> : <span class="when">{when}</span>}
      {!short && <span class={`kind ${kind}`}>{format.words(event.kind)}</span>}
      <span class={`text${short && kind !== "soft" ? ` ${kind}` : ""}`}>{event.text}</span>
      {!short && !own && event.signer && <a class="who" href={link(id, "nodes", event.signer)}><code>{format.brief(event.signer)}</code></a>}
    </Line>
  );
}
