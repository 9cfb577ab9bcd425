/** What the coordinator tells. Fields that a coordinator leaves out are undefined, and shown as unknown. */

type Maybe<T> = T | null | undefined;

export interface Line {
  run_id: string;
  phase: string;
  epoch: number;
  step: number;
  height?: Maybe<number>;
  total_steps?: Maybe<number>;
  clients?: number;
  id?: string;
  state?: string;
  progress?: Maybe<number>;
  nodes?: number;
  loss?: Maybe<number>;
  created?: Maybe<number>;
  started?: Maybe<number>;
  ended?: Maybe<number>;
  archived?: Maybe<number>;
  seconds_left?: Maybe<number>;
  waits_for?: string;
  problem?: Maybe<string>;
}

export interface Evaluation {
  task: string;
  step: number;
  documents?: Maybe<number>;
  measured?: number;
  figures: Record<string, number>;
}

export type Parts = Partial<Record<"compute" | "encode" | "wait" | "apply", Maybe<number>>>;

export interface Status extends Omit<Line, "nodes"> {
  incarnation?: string;
  pending_pause?: boolean;
  checkpoint?: { step: number; digest: string };
  manifest_digest?: Maybe<string>;
  config?: Record<string, Maybe<number | string | boolean>>;
  by_link?: boolean;
  allowed?: Maybe<string[]>;
  revoked?: string[];
  evaluations?: Evaluation[];
  since?: Maybe<number>;
  deadline?: Maybe<number>;
  awaited?: string[];
  awaited_count?: number;
  wanted?: Maybe<number>;
  settings?: Maybe<{
    k?: Maybe<number>;
    local_steps?: Maybe<number>;
    chunk?: Maybe<number>;
    overlap?: Maybe<boolean>;
    next?: Maybe<{ from_step: number; k?: Maybe<number>; local_steps?: Maybe<number> }>;
  }>;
  model?: Maybe<{ name?: Maybe<string>; dtype?: Maybe<string>; parameters?: Maybe<number> }>;
  data?: Maybe<{ name?: Maybe<string>; seq_len?: Maybe<number> }>;
  recipe?: boolean;
  allreduce_bytes?: Maybe<number>;
  digests?: Maybe<{
    step: number;
    digest: string;
    agreed: Maybe<boolean>;
    named_by?: number;
    others?: { node: string; step: number; digest: string }[];
  }>;
  node_numbers?: Record<string, string>;
}

export interface Node {
  key: string;
  signer: string;
  address?: string;
  status: string;
  step?: Maybe<number>;
  loss?: Maybe<number>;
  tokens_per_second?: Maybe<number>;
  bytes_up?: Maybe<number>;
  bytes_down?: Maybe<number>;
  figures?: Record<string, { step: number; value: number }>;
  share?: Maybe<number>;
  joined?: Maybe<number>;
  left?: Maybe<number>;
  reason?: Maybe<string>;
  seen?: Maybe<number>;
  joins?: number;
  points?: number;
  rounds?: Partial<Record<"delivered" | "late" | "absent" | "excluded" | "rested", number>>;
  link?: Maybe<{ up?: Maybe<number>; down?: Maybe<number> }>;
  parts?: Maybe<Parts>;
  audits?: { time: number; kind: string; good: boolean; text: string; by?: string }[];
  region?: Maybe<string>;
}

/** The figures of a round, or the means of several older ones. */
export interface Row {
  step: number;
  epoch: number;
  time: number;
  height?: number;
  first_step?: number;
  clients?: number;
  loss?: Maybe<number>;
  validation_loss?: Maybe<number>;
  learning_rate?: Maybe<number>;
  tokens_per_second?: Maybe<number>;
  bytes_up?: Maybe<number>;
  bytes_down?: Maybe<number>;
  seconds?: Maybe<number>;
  ratio?: Maybe<number>;
  reports?: number;
  parts?: Parts;
  figures?: Record<string, number>;
}

export interface Delivery {
  epoch: number;
  height: number;
  step: number;
  time: number;
  seconds?: Maybe<number>;
  decided?: boolean;
  nodes: number[];
  marks: string;
}

export interface Event {
  time: number;
  kind: string;
  text: string;
  epoch: number;
  step: number;
  signer?: string;
  number?: number;
}

export interface Lists {
  events: Event[];
  metrics: Row[];
  past: Row[];
  rounds: Delivery[];
}

export interface Run extends Lists {
  status: Status;
  nodes: Map<string, Node>;
}

export const idOf = (line: Line): string => line.id ?? line.run_id;

/** A run's state in a word; a coordinator that does not tell it tells its phase. */
export function stateOf(line: { state?: string; phase: string; problem?: Maybe<string> }): string {
  if (line.state) return line.state;
  const known: Record<string, string> = {
    uninitialized: "waiting", waiting_for_members: "waiting", round_train: "training", round_witness: "training",
  };
  return known[line.phase] ?? line.phase;
}

export const progressOf = (line: Line | Status): number | null =>
  line.progress ?? (line.total_steps ? Math.min(1, Math.max(0, (line.step - 1) / line.total_steps)) : null);
