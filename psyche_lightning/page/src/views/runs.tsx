/** All runs of the coordinator, as a table that can be filtered and sorted. */

import * as format from "../format";
import { home } from "../feed";
import { idOf, progressOf, stateOf, type Line } from "../model";
import { Bar, Choice, Moment, Tag } from "../parts";
import { link, setOptions } from "../route";

type Group = "all" | "active" | "over";

const over = (line: Line) => line.archived != null || stateOf(line) === "finished";
const began = (line: Line) => line.started ?? line.created ?? 0;

const ORDERS: Record<string, (line: Line) => number | string> = {
  name: line => line.run_id,
  state: stateOf,
  progress: line => progressOf(line) ?? -1,
  nodes: line => line.nodes ?? line.clients ?? 0,
  loss: line => line.loss ?? Infinity,
  started: line => -began(line),
};

export function Runs({ lines, mostClosed, options }: { lines: Line[]; mostClosed: number | null; options: URLSearchParams }) {
  const wanted = options.get("filter") ?? "";
  const group = (options.get("show") as Group | null) ?? "all";
  const order = options.get("sort") ?? "";
  const value = ORDERS[order];
  const found = lines
    .filter(line => (group === "all" || over(line) === (group === "over")))
    .filter(line => `${line.run_id} ${stateOf(line)}`.toLowerCase().includes(wanted.toLowerCase()));
  const compare = (a: Line, b: Line) => {
    if (!value) return Number(over(a)) - Number(over(b)) || began(b) - began(a);
    const [x, y] = [value(a), value(b)];
    return x < y ? -1 : x > y ? 1 : 0;
  };
  const sorted = found.map((line, i) => [line, i] as const).sort(([a, i], [b, k]) => compare(a, b) || k - i).map(([line]) => line);

  if (!lines.length) {
    return (
      <section class="nothing">
        <h1>No runs yet</h1>
        <p>The owner of this coordinator creates one:</p>
        <pre><code>psyche run create RUN --coordinator {home.slice(0, -1)}</code></pre>
      </section>
    );
  }
  const heads: [string, string, string][] = [
    ["name", "Run", ""], ["state", "State", ""], ["progress", "Steps", ""], ["nodes", "Nodes", "n"], ["loss", "Loss", "n"], ["started", "Started", ""],
  ];
  return (
    <section>
      <div class="headline">
        <h1>Runs</h1>
        <Choice<Group>
          label="Which runs"
          value={group}
          choices={[["all", "All"], ["active", "Active"], ["over", "Over"]]}
          onChange={next => setOptions({ show: next === "all" ? null : next })}
        />
        <input
          type="search"
          aria-label="Filter by name or state"
          placeholder="Filter"
          value={wanted}
          onInput={event => setOptions({ filter: event.currentTarget.value })}
        />
        <span class="soft" role="status">{found.length === lines.length ? format.counted(lines.length, "run") : `${found.length} of ${format.counted(lines.length, "run")}`}</span>
      </div>
      <table class="runs">
        <thead>
          <tr>
            {heads.map(([name, text, kind]) => (
              <th key={name} scope="col" class={`${kind} of-${name}`} aria-sort={order === name ? "ascending" : undefined}>
                <button type="button" onClick={() => setOptions({ sort: order === name ? null : name })}>{text}</button>
              </th>
            ))}
            <th scope="col" class="n of-left">Time left</th>
          </tr>
        </thead>
        <tbody>
          {sorted.map(line => <RunRow key={idOf(line)} line={line} />)}
        </tbody>
      </table>
      {!sorted.length && <p class="empty">No run fits.</p>}
      {mostClosed !== null && lines.filter(line => line.archived != null).length >= mostClosed && (
        <p class="soft kept">Of closed runs, the newest {format.count(mostClosed)} are kept; the histories of older ones are deleted.</p>
      )}
    </section>
  );
}

function RunRow({ line }: { line: Line }) {
  const state = stateOf(line);
  const progress = progressOf(line);
  const steps = `${format.count(line.step - 1)} / ${format.count(line.total_steps)}`;
  return (
    <tr>
      <th scope="row" class="of-name"><a href={link(idOf(line))}>{line.run_id}</a>{line.problem && <span class="why bad">{line.problem}</span>}</th>
      <td class="of-state"><Tag state={state} />{line.archived != null && <span class="soft"> closed</span>}</td>
      <td class="of-progress"><Bar value={progress} label={`Progress of ${line.run_id}`} /><span class="steps">{steps}</span></td>
      <td class="n of-nodes"><span class="label">nodes </span>{line.nodes ?? line.clients ?? "–"}</td>
      <td class="n of-loss"><span class="label">loss </span>{format.loss(line.loss)}</td>
      <td class="of-started"><Moment time={line.started ?? line.created} /></td>
      <td class="n of-left">{line.ended != null ? <><span class="soft">ended </span><Moment time={line.ended} /></> : line.seconds_left != null ? format.lasting(line.seconds_left) : "–"}</td>
    </tr>
  );
}
