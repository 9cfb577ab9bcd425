/** A run's figures: the newest in a line, then by step, by node and round, and what happened last. */

import { useMemo } from "preact/hooks";
import { Chart, type View } from "../charts/chart";
import { curve, families, trained, type Axis, type Curve } from "../charts/curves";
import { Heat } from "../charts/heat";
import { home } from "../feed";
import * as format from "../format";
import type { Evaluation, Row, Run, Status } from "../model";
import { Choice, Figure } from "../parts";
import { link, setOptions } from "../route";
import { EventLine } from "./events";

const PARTS = ["compute", "encode", "wait", "apply"] as const;
const TONES = ["c1", "c2", "c3", "c4", "c5", "c6"];
const SHOWN_EVENTS = 9;

export function Overview({ run, id, options, here }: { run: Run; id: string; options: URLSearchParams; here: number }) {
  const { status } = run;
  const axis: Axis = options.get("by") === "time" ? "time" : "step";
  const smoothing = Math.min(0.98, Math.max(0, Number(options.get("smooth")) || 0));
  const log = options.get("log") === "1";
  const range = useMemo(() => {
    const [from, to] = [options.get("from"), options.get("to")].map(text => (text === null ? NaN : Number(text)));
    return from! < to! ? ([from, to] as [number, number]) : null;
  }, [options.get("from"), options.get("to")]);
  const hidden = useMemo(() => new Set((options.get("hide") ?? "").split(",").filter(Boolean)), [options.get("hide")]);
  const view: View = {
    hidden,
    onHide: label => setOptions({ hide: [...(hidden.has(label) ? [...hidden].filter(one => one !== label) : [...hidden, label])].join(",") }),
    axis,
    smoothing,
    range,
    onRange: chosen => {
      const text = (x: number) => String(axis === "step" ? Math.round(x * 10) / 10 : Math.round(x));
      setOptions({ from: chosen && text(chosen[0]), to: chosen && text(chosen[1]) });
    },
  };
  const rows = useMemo(() => trained(run.past, run.metrics), [run.past, run.metrics]);
  const told = (row: Row) => row.reports !== 0; // nobody has told figures of the newest rounds yet
  // Not all have told theirs of the rounds that are under way: a sum over them would be too small.
  const settled = status.phase === "finished" ? Infinity : rows.at(-2)?.step ?? 0;
  const summed = (row: Row) => row.reports === undefined || row.reports === row.clients || row.step < settled;
  const of = (value: (row: Row) => number | null | undefined) => curve(rows, axis, value);

  const charts = useMemo(() => {
    const one = (label: string, tone: string, value: (row: Row) => number | null | undefined, sparse = false): Curve => ({ label, tone, points: of(value), sparse });
    return {
      loss: [one("training", "c1", row => row.loss), one("validation", "c2", row => row.validation_loss, true)].filter((c, i) => i === 0 || c.points.length),
      tokens: [one("tokens per second", "c1", row => (summed(row) && row.tokens_per_second) || null)],
      bytes: [one("sent", "c1", row => (told(row) ? row.bytes_up : null)), one("received", "c2", row => (told(row) ? row.bytes_down : null))],
      ratio: [one("ratio", "c1", row => (told(row) ? row.ratio : null))],
      seconds: [one("round", "c1", row => row.seconds)],
      parts: PARTS.map((name, i) => one(name, TONES[i]!, row => row.parts?.[name])).filter(c => c.points.length),
      rate: [one("learning rate", "c1", row => row.learning_rate)],
      nodes: [one("nodes", "c1", row => row.clients)],
      named: [...families(rows)].map(([family, names]) => [
        family,
        names.map((name, i) => one(names.length > 1 ? name.slice(family.length + 1) || family : family, TONES[i % TONES.length]!, row => row.figures?.[name], false)),
      ] as [string, Curve[]]),
    };
  }, [rows, axis]);

  const last = <T,>(value: (row: Row) => T | null | undefined): T | null => {
    for (let i = rows.length - 1; i >= 0; i--) {
      const found = value(rows[i]!);
      if (found != null) return found;
    }
    return null;
  };
  const recent = (value: (row: Row) => number | null | undefined): number | null => {
    const found = rows.slice(-20).map(value).filter((one): one is number => one != null && one > 0).sort((a, b) => a - b);
    return found.length ? found[found.length >> 1]! : null;
  };
  const ratio = recent(row => row.ratio);
  const evaluations = status.evaluations ?? [];
  const events = run.events.slice(-SHOWN_EVENTS).reverse();

  return (
    <div class="overview">
      <dl class="figures">
        <Figure label="Training loss" value={format.loss(last(row => row.loss) ?? status.loss)} note={charts.loss.length > 1 && <>validation {format.loss(last(row => row.validation_loss))}</>} />
        <Figure label="Tokens per second" value={format.short(status.phase === "finished" ? recent(row => row.tokens_per_second) : last(row => (summed(row) && row.tokens_per_second) || null))} note={rows.length > 0 && "all nodes"} />
        <Figure label="Sent by a node, a round" value={format.bytes(recent(row => row.bytes_up))} note={ratio !== null && `all-reduce: ${format.count(Math.round(ratio))} × as much`} />
        <Figure label="Round" value={format.lasting(recent(row => row.seconds))} note={rows.length > 0 && "median of the last 20"} />
        <Figure label="Nodes" value={status.phase === "finished" ? last(row => row.clients) ?? "–" : here || status.clients || 0} note={status.phase === "finished" ? "at the end" : status.wanted ? `${format.counted(status.wanted, "more", "more")} needed` : "here now"} />
        <Digests status={status} />
      </dl>

      {rows.length === 0 && status.archived == null && <Invitation status={status} />}
      {rows.length > 0 && <div class="toolbar" role="group" aria-label="How charts are drawn">
        <Choice<Axis> label="Axis" value={axis} choices={[["step", "By step"], ["time", "By time"]]} onChange={by => setOptions({ by: by === "step" ? null : by, from: null, to: null })} />
        <label class="smooth">
          Smoothing
          <input type="range" min={0} max={0.98} step={0.02} value={smoothing} onInput={event => setOptions({ smooth: event.currentTarget.value === "0" ? null : event.currentTarget.value })} />
          <output>{smoothing.toFixed(2)}</output>
        </label>
        <button type="button" class="plain" aria-pressed={log} onClick={() => setOptions({ log: log ? null : "1" })}>Log scale</button>
        {range && <button type="button" class="plain" onClick={() => view.onRange(null)}>Show all steps</button>}
      </div>}

      <div class="boards">
        <section class="board wide">
          <Chart id="loss" {...view} title="Loss" curves={charts.loss} text={lossText(charts.loss)} plain log={log} height={rows.length > 1 ? 370 : 180} empty="The curve begins with the second step." />
        </section>
        <section class="board latest">
          <h2>Latest events</h2>
          {events.length ? <ol class="events brief">{events.map((event, i) => <EventLine key={event.number ?? `${event.time}-${i}`} event={event} id={id} short />)}</ol> : <p class="empty">Nothing has happened yet.</p>}
          {run.events.length > SHOWN_EVENTS && <a href={link(id, "events")}>All events</a>}
        </section>
        {rows.length > 0 && <section class="board"><Chart {...view} title="Tokens per second, all nodes" curves={charts.tokens} text={format.short} log={log} fromZero={!log} /></section>}
        {rows.length > 0 && <section class="board"><Chart {...view} title="Bytes of a node in a round" curves={charts.bytes} text={format.bytes} log={log} fromZero={!log} /></section>}
        {charts.seconds[0]!.points.length > 0 && <section class="board"><Chart {...view} title="Round time" curves={charts.seconds} text={format.lasting} tick={format.span} log={log} fromZero={!log} cuts /></section>}
        {charts.parts.length > 0 && <section class="board"><Chart {...view} smoothing={0} title="Round time in parts" curves={charts.parts} text={format.lasting} tick={format.span} stacked /></section>}
        {charts.rate[0]!.points.length > 0 && <section class="board"><Chart {...view} smoothing={0} title="Learning rate" curves={charts.rate} text={format.figure} fromZero /></section>}
        {charts.ratio[0]!.points.length > 0 && <section class="board"><Chart {...view} title="Times fewer bytes than an all-reduce" curves={charts.ratio} text={value => `${format.count(Math.round(value))} ×`} fromZero /></section>}
        {rows.length > 0 && <section class="board"><Chart {...view} smoothing={0} title="Nodes in the round" curves={charts.nodes} text={value => format.figure(value)} fromZero /></section>}
        {charts.named.map(([family, curves]) => (
          <section class="board" key={family}><Chart {...view} title={format.capital(format.words(family))} curves={curves} text={format.figure} /></section>
        ))}
        {evaluationCharts(evaluations).map(([name, curves]) => (
          <section class="board" key={name}><Chart {...view} axis="step" range={axis === "step" ? range : null} smoothing={0} title={`Evaluations: ${name}`} curves={curves} text={value => value.toFixed(3)} /></section>
        ))}
      </div>

      {evaluations.length > 0 && <Evaluations evaluations={evaluations} />}

      {rows.length > 0 && (
        <section class="rounds" id="rounds">
          <h2>Nodes by round</h2>
          <Heat run={id} rounds={run.rounds} numbers={status.node_numbers ?? {}} />
        </section>
      )}
    </div>
  );
}

/** How nodes come to a run that has not begun. */
function Invitation({ status }: { status: Status }) {
  const closed = Boolean(status.allowed);
  return (
    <section class="invitation">
      <h2>How nodes join</h2>
      <p class="soft">
        {closed ? "Those whose keys the owner has authorized may join, on any machine with psyche_lightning:"
          : status.by_link ? "Whoever has the join link may. The owner prints it:"
          : "Everybody may, on any machine with psyche_lightning:"}
      </p>
      <pre><code>{status.by_link && !closed
        ? `psyche run link ${status.run_id}\npsyche join LINK`
        : status.recipe ? `psyche join ${home.slice(0, -1)} --run ${status.run_id}` : `psyche train RECIPE --coordinator ${home.slice(0, -1)} --run ${status.run_id}`}</code></pre>
    </section>
  );
}

function Digests({ status }: { status: Status }) {
  const named = status.digests;
  if (!named) {
    const held = status.checkpoint;
    return <Figure label="Parameters" value={held?.digest ? <code>{held.digest.slice(0, 8)}</code> : "–"} note={held?.digest ? `of step ${format.count(held.step)}` : undefined} />;
  }
  const others = named.others ?? [];
  if (named.agreed == null) return <Figure label="Parameters" value="–" note="not named yet" />;
  const [word, kind] = named.agreed ? ["agreed", "good"] : ["differ", "bad"];
  return (
    <Figure
      label="Parameters"
      value={<span class={kind} id="digests">{word}</span>}
      note={<><code>{named.digest.slice(0, 8)}</code> at step {format.count(named.step)}{named.named_by ? `, by ${format.counted(named.named_by, "node")}` : ""}{others.length > 0 && <span class="bad">; others: {others.map(one => format.brief(one.node)).join(", ")}</span>}</>}
    />
  );
}

/** The newest of each task, with its figures. */
function Evaluations({ evaluations }: { evaluations: Evaluation[] }) {
  const newest = new Map(evaluations.map(one => [one.task, one]));
  return (
    <section>
      <h2>Evaluations, the newest of each task</h2>
      <div class="scroll" tabIndex={0} role="region" aria-label="Evaluations">
        <table id="tasks" class="folds">
          <thead><tr><th scope="col">Task</th><th scope="col">Figures</th><th scope="col" class="n">After step</th><th scope="col" class="n">Documents</th></tr></thead>
          <tbody>
            {[...newest.values()].map(one => (
              <tr key={one.task}>
                <th scope="row"><code>{one.task}</code></th>
                <td>{Object.entries(one.figures).map(([name, value]) => `${name} ${value.toFixed(4)}`).join(", ")}</td>
                <td class="n" data-label="After step">{format.count(one.step)}</td>
                <td class="n" data-label="Documents">{format.count(one.measured)} of {format.count(one.documents)}</td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </section>
  );
}

/** A chart for each kind of figure, with a curve for each task; only once there are two values. */
function evaluationCharts(evaluations: Evaluation[]): [string, Curve[]][] {
  const found = new Map<string, Map<string, Map<number, number>>>();
  for (const one of evaluations) {
    for (const [name, value] of Object.entries(one.figures)) {
      const tasks = found.get(name) ?? found.set(name, new Map()).get(name)!;
      (tasks.get(one.task) ?? tasks.set(one.task, new Map()).get(one.task)!).set(one.step, value);
    }
  }
  return [...found]
    .map(([name, tasks]) => [name, [...tasks].map(([task, points], i) => ({
      label: task, tone: TONES[i % TONES.length]!, sparse: true, points: [...points].sort(([a], [b]) => a - b),
    }))] as [string, Curve[]])
    .filter(([, curves]) => curves.some(one => one.points.length > 1));
}

/** As many digits as the curves need, so that labels of the axis differ. */
function lossText(curves: Curve[]): (value: number) => string {
  let [low, high] = [Infinity, -Infinity];
  for (const { points } of curves) for (const [, y] of points) [low, high] = [Math.min(low, y), Math.max(high, y)];
  const digits = high - low < 0.05 ? 4 : 3;
  return value => value.toFixed(digits);
}
