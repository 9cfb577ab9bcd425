/** What a run is: its model, its settings, who may join, and the manifest that its nodes agreed on. */

import { useEffect, useState } from "preact/hooks";
import { home } from "../feed";
import * as format from "../format";
import type { Status } from "../model";
import { Moment } from "../parts";

type Fact = [string, preact.ComponentChildren];

export function About({ status }: { status: Status }) {
  const { model, data, settings, config = {} } = status;
  const next = settings?.next;
  const facts: Fact[] = [
    ["Model", model?.name],
    ["Trained parameters", model?.parameters != null && model.parameters.toLocaleString("en")],
    ["Numbers", model?.dtype],
    ["Data", data?.name],
    ["Sequence length", data?.seq_len != null && format.count(data.seq_len)],
    ["Entries of a chunk (k)", settings?.k != null && `${settings.k}${settings.chunk ? ` of ${settings.chunk} × ${settings.chunk}` : ""}`],
    ["Local steps (H)", settings?.local_steps ? String(settings.local_steps) : null],
    ["Exchange overlaps training", settings?.overlap == null ? null : settings.overlap ? "yes" : "no"],
    ["Next change", next && `k ${next.k ?? "–"}, H ${next.local_steps ?? "–"} from step ${format.count(next.from_step)}`],
    ["Bytes of an all-reduce", status.allreduce_bytes != null && format.bytes(status.allreduce_bytes)],
    ["Parameters that are agreed", status.checkpoint?.digest && <><code class="key">{status.checkpoint.digest}</code> of step {format.count(status.checkpoint.step)}</>],
    ["Who may join", who(status)],
    ["Created", status.created != null && <Moment time={status.created} />],
    ["Incarnation", status.incarnation && <code class="key">{status.incarnation}</code>],
  ];
  return (
    <div class="boards two about">
      <section class="board">
        <h2>The run</h2>
        <Facts facts={facts} />
      </section>
      <section class="board">
        <h2>Its rules</h2>
        <Facts short facts={Object.entries(config).map(([name, value]) => [format.capital(format.words(name)), setting(name, value)])} />
      </section>
      <section class="board whole">
        <h2>Manifest</h2>
        <Manifest digest={status.manifest_digest ?? null} recipe={status.recipe} />
      </section>
    </div>
  );
}

function who(status: Status): string {
  const revoked = status.revoked?.length ? `, but ${format.counted(status.revoked.length, "key")}` : "";
  if (status.allowed) return `${format.counted(status.allowed.length, "named key")}${revoked}`;
  return (status.by_link ? "who has the join link" : "everybody") + revoked;
}

/** A setting in words; those of times are in seconds. */
function setting(name: string, value: unknown): string {
  if (value === null) return "as the first node has it";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value !== "number") return String(value);
  const number = value.toLocaleString("en", { maximumFractionDigits: 6 });
  return !name.endsWith("_time") ? number : value < 120 ? `${number} s` : `${number} s (${format.lasting(value)})`;
}

function Facts({ facts, short }: { facts: Fact[]; short?: boolean }) {
  const known = facts.filter(([, value]) => value !== null && value !== undefined && value !== false && value !== "");
  return <dl class={short ? "facts short" : "facts"}>{known.map(([name, value]) => <><dt>{name}</dt><dd>{value}</dd></>)}</dl>;
}

function Manifest({ digest, recipe }: { digest: string | null; recipe?: boolean }) {
  const [held, setHeld] = useState<{ digest: string; text: string } | null>(null);
  const [problem, setProblem] = useState("");
  useEffect(() => {
    if (!digest) return;
    const ended = new AbortController();
    fetch(`${home}v1/manifests/${digest}`, { signal: ended.signal })
      .then(answer => (answer.ok ? answer.json() : Promise.reject(new Error(`the coordinator answers ${answer.status}`))))
      .then(manifest => setHeld({ digest, text: JSON.stringify(manifest, null, 2) }))
      .catch(error => ended.signal.aborted || setProblem(String(error.message)));
    return () => ended.abort();
  }, [digest]);
  if (!digest) return <p class="empty">The first node that joins brings it.</p>;
  return (
    <>
      <p class="soft">{recipe ? "It is a recipe's. " : ""}All nodes have the same one. SHA-256 <code class="key">{digest}</code></p>
      {problem && <p class="problem">The manifest could not be read: {problem}.</p>}
      {held?.digest === digest && <pre class="scroll" tabIndex={0} aria-label="Manifest as JSON"><code>{held.text}</code></pre>}
    </>
  );
}
