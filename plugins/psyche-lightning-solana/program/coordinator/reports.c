// What clients send: ticks, reports, health checks. All but a tick come from registered clients.
#include "coordinator/context.h"

static u64 need_member(const Context *context) {
  return find_member(&context->run, context->user->key) == NOBODY ? SignerNotAClient : 0;
}

static u64 finish(Context *context) {
  settle(&context->run);
  return close_context(context);
}

NOINLINE u64 tick_run(Input *input) {
  Context context;
  Reader fields = reader(input->data, input->data_length);
  TRY(ended(&fields));
  TRY(open_context(&context, input, 1, 0));
  TRY(tick(&context.run));
  return close_context(&context);
}

static void read_filter(Reader *reader, Bloom *bloom) { read_bytes(reader, bloom, sizeof *bloom); }

// Proof, both filters, and the root.
static NOINLINE void read_witness(Reader *reader, Witness *witness) {
  fill_zero(witness, sizeof *witness);
  witness->position = read_u64(reader);
  witness->index = read_u64(reader);
  witness->witness = read_bool(reader);
  read_filter(reader, &witness->participants);
  read_filter(reader, &witness->broadcasts);
  read_key(reader, &witness->merkle);
}

#define MAX_EVALS 8
#define MAX_PROMPTS 16

// Figures for whoever reads the transaction; here only the step counts. Psyche's vectors have all their elements, used
// or not, then their length.
static NOINLINE u32 read_metrics(Reader *reader) {
  u32 step = read_u32(reader);
  for (int i = 0; i < 3; i++) read_f32(reader);  // tokens and bytes per second, loss
  for (int i = 0; i < MAX_EVALS; i++) {
    read_raw(reader, 32);  // name
    read_f32(reader);
  }
  if (read_u64(reader) > MAX_EVALS) reader->bad = true;
  read_raw(reader, 4 * MAX_PROMPTS);
  if (read_u64(reader) > MAX_PROMPTS) reader->bad = true;
  read_u8(reader);   // index of the prompt
  read_f32(reader);  // efficiency
  return step;
}

NOINLINE u64 send_witness(Input *input) {
  Context context;
  Witness report;
  Reader fields = reader(input->data, input->data_length);
  read_witness(&fields, &report);
  u32 step = read_metrics(&fields);
  bool bound = fields.left > 0;  // clients of Psyche do not say which round they mean
  u16 epoch = bound ? read_u16(&fields) : 0;
  u32 height = bound ? read_u32(&fields) : 0;
  u32 held = bound ? read_u32(&fields) : 0;
  Key digest = {{0, 0, 0, 0}};
  if (bound) read_key(&fields, &digest);
  TRY(ended(&fields));
  TRY(open_context(&context, input, 1, 0));
  Run *run = &context.run;
  TRY(need_member(&context));
  TRY(need_running_round(run));
  const Progress *progress = &run->account->progress;
  REQUIRE(!bound || (epoch == progress->epoch && height == current_round(run)->height), CoordinatorErrorInvalidWitness);
  REQUIRE(step == 0 || step == progress->step, CoordinatorErrorInvalidWitness);
  TRY(witness(run, context.user->key, &report, held, &digest));
  return finish(&context);
}

NOINLINE u64 send_warmup_witness(Input *input) {
  Context context;
  Witness report;
  Reader fields = reader(input->data, input->data_length);
  read_witness(&fields, &report);
  bool bound = fields.left > 0;
  u16 epoch = bound ? read_u16(&fields) : 0;
  TRY(ended(&fields));
  TRY(open_context(&context, input, 1, 0));
  Run *run = &context.run;
  TRY(need_member(&context));
  REQUIRE(!halted(run), CoordinatorErrorHalted);
  REQUIRE(!bound || epoch == run->account->progress.epoch, CoordinatorErrorInvalidWitness);
  TRY(warmup_witness(run, context.user->key, report.index, &report.merkle));
  return finish(&context);
}

NOINLINE u64 send_health_check(Input *input) {
  Context context;
  HealthClaim claim;
  Reader fields = reader(input->data, input->data_length);
  read_key(&fields, &claim.signer);
  read_raw(&fields, 32);  // its node key
  claim.committee = read_tag(&fields, 3);
  claim.position = read_u64(&fields);
  claim.index = read_u64(&fields);
  TRY(ended(&fields));
  TRY(open_context(&context, input, 1, 0));
  TRY(need_member(&context));
  TRY(health_check(&context.run, context.user->key, &claim));
  return finish(&context);
}
