/** One node of a run: its figures, its link, its rounds, its audits and what happened to it. */

import { useMemo } from "preact/hooks";
import { Heat } from "../charts/heat";
import * as format from "../format";
import type { Node, Run } from "../model";
import { Ago, Figure, Moment, Tag } from "../parts";
import { link } from "../route";
import { Events } from "./events";

const PARTS = [["compute", "c1"], ["encode", "c2"], ["wait", "c3"], ["apply", "c4"]] as const;
const ROUNDS = [["delivered", "cell"], ["late", "warn"], ["absent", "bad"], ["excluded", "c3"], ["rested", "line-strong"]] as const;

export function NodeView({ run, id, signer, options }: { run: Run; id: string; signer: string; options: URLSearchParams }) {
  const node = run.nodes.get(signer);
  const mine = useMemo(() => run.rounds.filter(round => round.nodes.some(number => run.status.node_numbers?.[number] === signer)), [run.rounds, signer]);
  if (!node) {
    return <section class="nothing"><h2>No such node in this run</h2><p><code>{signer}</code></p><p><a href={link(id, "nodes")}>All nodes</a></p></section>;
  }
  return (
    <section class="node">
      <div class="headline">
        <h2 class="big">Node <code>{node.key}</code></h2>
        <Tag state={node.status} />
        {node.region && <span class="soft">{node.region}</span>}
        <a class="back" href={link(id, "nodes")}>All nodes</a>
      </div>
      {node.reason && <p class="reason">{node.reason}</p>}
      <dl class="figures">
        <Figure label="Step" value={format.count(node.step)} note={node.seen != null && <>seen <Ago time={node.seen} /></>} />
        <Figure label="Loss of its samples" value={format.loss(node.loss)} />
        <Figure label="Tokens per second" value={format.short(node.tokens_per_second)} note={node.share != null && `${format.percent(node.share)} of the samples`} />
        {node.left == null ? (
          <>
            <Figure label="Sends" value={format.rate(node.link?.up)} note={`${format.bytes(node.bytes_up)} in all`} />
            <Figure label="Receives" value={format.rate(node.link?.down)} note={`${format.bytes(node.bytes_down)} in all`} />
          </>
        ) : (
          <>
            <Figure label="Sent" value={format.bytes(node.bytes_up)} />
            <Figure label="Received" value={format.bytes(node.bytes_down)} />
          </>
        )}
        <Figure label="Points" value={format.count(node.points)} />
      </dl>
      <div class="boards two">
        <section class="board">
          <h3>Rounds of the whole run</h3>
          <Split parts={ROUNDS.map(([name, tone]) => [name, tone, node.rounds?.[name] ?? null])} text={format.count} />
          <h3>Newest round in parts</h3>
          <Split parts={PARTS.map(([name, tone]) => [name, tone, node.parts?.[name] ?? null])} text={format.lasting} />
        </section>
        <section class="board">
          <h3>About it</h3>
          <dl class="facts">
            <dt>Key</dt><dd><code class="key">{node.signer}</code></dd>
            {node.region && <><dt>Region</dt><dd>{node.region}</dd></>}
            <dt>Address</dt><dd>{node.address ? <code>{node.address}</code> : "–"}</dd>
            <dt>Joined</dt><dd><Moment time={node.joined} />{(node.joins ?? 1) > 1 && `, ${node.joins} times`}</dd>
            {node.left != null && <><dt>Left</dt><dd><Moment time={node.left} /></dd></>}
            {Object.entries(node.figures ?? {}).map(([name, { value, step }]) => (
              <><dt>{format.capital(format.words(name))}</dt><dd>{format.figure(value)} <span class="soft">at step {format.count(step)}</span></dd></>
            ))}
          </dl>
        </section>
      </div>
      <section class="rounds">
        <h2>Its rounds</h2>
        <Heat run={id} rounds={mine} numbers={run.status.node_numbers ?? {}} only={signer} />
      </section>
      <Audits node={node} id={id} />
      <h2>Its events</h2>
      <Events run={run} id={id} options={options} signer={signer} />
    </section>
  );
}

/** Amounts side by side, with their names below. */
function Split({ parts, text }: { parts: [string, string, number | null][]; text: (value: number) => string }) {
  const known = parts.filter(([, , value]) => value !== null) as [string, string, number][];
  const sum = known.reduce((total, [, , value]) => total + value, 0);
  if (!known.length) return <p class="empty">Not reported.</p>;
  return (
    <>
      <div class="split" aria-hidden="true">{known.filter(([, , value]) => value > 0).map(([name, tone, value]) => <i key={name} style={{ flexGrow: value / (sum || 1), background: `var(--${tone})` }} />)}</div>
      <p class="legend">{known.map(([name, tone, value]) => <span key={name}><i class="key" style={{ color: `var(--${tone})` }} /> {name} <b>{text(value)}</b></span>)}</p>
    </>
  );
}

function Audits({ node, id }: { node: Node; id: string }) {
  const audits = node.audits ?? [];
  if (!audits.length) return null;
  return (
    <section class="audits">
      <h2>Audits</h2>
      <ol class="events">
        {[...audits].reverse().map((audit, i) => (
          <li class="event" key={`${audit.time}-${i}`}>
            <span class="when"><Moment time={audit.time} /></span>
            <span class={`kind ${audit.good ? "good" : "bad"}`}>{format.words(audit.kind)}</span>
            <span class="text">{audit.text}</span>
            {audit.by && <a class="who" href={link(id, "nodes", audit.by)}>by <code>{format.brief(audit.by)}</code></a>}
          </li>
        ))}
      </ol>
    </section>
  );
}
