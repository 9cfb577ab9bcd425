/** One run: what it is, how far it is, what it does now, and its views. */

import type { ComponentChildren } from "preact";
import * as format from "../format";
import { progressOf, stateOf, type Run, type Status } from "../model";
import { Bar, Moment, Tag, useNow } from "../parts";
import { link, type Route, type Tab } from "../route";
import { About } from "./about";
import { Events } from "./events";
import { NodeView } from "./node";
import { Nodes } from "./nodes";
import { Overview } from "./overview";

const STATES: Record<string, string> = {
  waiting: "waiting for nodes", warmup: "warming up", training: "training", ending: "epoch is ending",
  paused: "paused", finished: "finished", stalled: "stalled",
};

export function RunView({ run, id, route }: { run: Run; id: string; route: Route }) {
  const { status } = run;
  const here = [...run.nodes.values()].filter(node => node.status === "healthy" || node.status === "pending").length;
  const tabs: [Tab, string, number | null][] = [
    ["overview", "Overview", null], ["nodes", "Nodes", run.nodes.size], ["events", "Events", null], ["about", "About", null],
  ];
  return (
    <>
      <Head status={status} />
      <nav class="tabs" aria-label="Views of the run">
        {tabs.map(([tab, text, number]) => (
          <a key={tab} href={link(id, tab)} aria-current={route.tab === tab ? "page" : undefined}>
            {text}{number !== null && number > 0 && <span class="soft"> {number}</span>}
          </a>
        ))}
      </nav>
      {route.tab === "overview" && <Overview run={run} id={id} options={route.options} here={here} />}
      {route.tab === "nodes" && !route.node && <Nodes run={run} id={id} options={route.options} />}
      {route.tab === "nodes" && route.node && <NodeView run={run} id={id} signer={route.node} options={route.options} />}
      {route.tab === "events" && <Events run={run} id={id} options={route.options} />}
      {route.tab === "about" && <About status={status} />}
    </>
  );
}

function Head({ status }: { status: Status }) {
  const state = stateOf(status);
  const progress = progressOf(status);
  const over = state === "finished";
  const model = [
    status.model?.name,
    status.model?.parameters != null && `${format.short(status.model.parameters)} parameters`,
    status.model?.dtype,
    status.data?.name,
  ].filter(Boolean);
  return (
    <div class="run-head">
      <div class="headline">
        <h1>{status.run_id}</h1>
        <span role="status"><Tag state={state}>{STATES[state] ?? format.words(state)}</Tag></span>
        {status.pending_pause && <span class="warn">pauses after this epoch</span>}
        {status.archived != null && <span class="soft">closed <Moment time={status.archived} /></span>}
      </div>
      {model.length > 0 && <p class="soft model">{model.join(" · ")}</p>}
      {status.problem && <p class="problem" role="alert">{status.problem}</p>}
      <div class="progress">
        <Bar value={progress} label="Steps trained" />
        <p>
          <span><b id="steps">{format.count(status.step - 1)} / {format.count(status.total_steps)}</b> steps</span>
          {progress !== null && <span class="soft">{format.percent(progress)}</span>}
          <span class="soft">epoch {status.epoch}{status.height != null && `, round ${status.height}`}</span>
          {status.started != null && <span class="soft">started <Moment time={status.started} /></span>}
          {over && status.ended != null && status.started != null && <span class="soft">took {format.lasting(status.ended - status.started)}</span>}
          {!over && status.seconds_left != null && <span class="soft">about {format.lasting(status.seconds_left)} left</span>}
        </p>
      </div>
      {status.archived == null && <Phase status={status} state={state} />}
    </div>
  );
}

const PHASES: Record<string, string> = {
  uninitialized: "The run is being set up", waiting_for_members: "Waiting for nodes", warmup: "Nodes load the parameters",
  round_train: "Nodes train", round_witness: "Witnesses report the round", finished: "All steps are trained", paused: "The owner paused the run",
};

/** What the run does now, for whom it waits, and when time alone ends that. */
function Phase({ status, state }: { status: Status; state: string }) {
  const now = useNow();
  const awaited = status.awaited ?? [];
  const more = (status.awaited_count ?? awaited.length) - awaited.length;
  const left = status.deadline != null ? status.deadline - now : null;
  const waits: ComponentChildren =
    awaited.length > 0 ? <>{!status.waits_for && "waits for "}{awaited.map((signer, i) => <span key={signer}>{i > 0 && ", "}<a href={link(status.id ?? status.run_id, "nodes", signer)}><code>{format.brief(signer)}</code></a></span>)}{more > 0 && ` and ${more} more`}</>
    : status.wanted && !status.waits_for ? `needs ${format.counted(status.wanted, "more node")}` : null;
  const what = state === "ending" ? "The epoch ends: what is under way is exchanged" : PHASES[status.phase] ?? format.words(status.phase);
  return (
    <p class={`phase ${state}`}>
      <span class={status.waits_for ? "what waits" : "what"}>{status.waits_for || what}</span>
      {waits && <span class="waits">{waits}</span>}
      {left !== null && left > 0 && <span class="countdown" title="Then time alone ends this phase">at most <b>{format.clock(left)}</b> more</span>}
      {status.since != null && left === null && state !== "finished" && <span class="soft">since <Moment time={status.since} /></span>}
    </p>
  );
}
