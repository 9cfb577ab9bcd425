#include "coordinator/arguments.h"

void read_metadata(Reader *reader, Metadata *metadata) {
  read_fixed(reader, metadata->name, sizeof metadata->name);
  read_fixed(reader, metadata->description, sizeof metadata->description);
  metadata->num_parameters = read_u64(reader);
  metadata->vocab_size = read_u64(reader);
}

_Static_assert(sizeof(Config) == 6 * 8 + 4 + 5 * 2 + 2, "no padding: both forms are the same");

void read_config(Reader *reader, Config *config) { read_bytes(reader, config, sizeof *config); }

void read_progress(Reader *reader, Progress *progress) {
  progress->epoch = read_u16(reader);
  progress->padding = 0;
  progress->step = read_u32(reader);
  progress->epoch_start_data_index = read_u64(reader);
}

NOINLINE void read_checkpoint(Reader *reader, CheckpointSource *checkpoint) {
  fill_zero(checkpoint, sizeof *checkpoint);
  checkpoint->tag = read_tag(reader, 6);
  if (checkpoint->tag == CHECKPOINT_EPHEMERAL) return;
  read_fixed(reader, checkpoint->name, sizeof checkpoint->name);
  checkpoint->has_prefix = read_tag(reader, 2);
  if (checkpoint->has_prefix) read_fixed(reader, checkpoint->prefix, sizeof checkpoint->prefix);
}

static NOINLINE void read_http(Reader *reader, HttpData *http) {
  http->location_tag = read_tag(reader, 3);
  if (http->location_tag == HTTP_SINGLE_URL) {
    read_fixed(reader, http->location.url, sizeof http->location.url);
  } else if (http->location_tag == HTTP_NUMBERED_FILES) {
    NumberedFiles *files = &http->location.files;
    read_fixed(reader, files->url_template, sizeof files->url_template);
    files->start_index = read_u32(reader);
    files->left_pad_zeros = read_u8(reader);
    files->num_files = read_u32(reader);
  } else {
    read_fixed(reader, http->location.gcp.bucket, sizeof http->location.gcp.bucket);
    read_fixed(reader, http->location.gcp.directory, sizeof http->location.gcp.directory);
  }
  http->token_size = read_tag(reader, 2);
  http->shuffle_tag = read_tag(reader, 2);
  if (http->shuffle_tag == 1) read_bytes(reader, http->seed, sizeof http->seed);
}

static NOINLINE void read_data_location(Reader *reader, DataLocation *data) {
  data->tag = read_tag(reader, 6);
  switch (data->tag) {
    case DATA_DUMMY: return;
    case DATA_SERVER: return read_fixed(reader, data->server, sizeof data->server);
    case DATA_HTTP: return read_http(reader, &data->http);
    default: return read_fixed(reader, data->text, sizeof data->text);
  }
}

static NOINLINE void read_schedule(Reader *reader, Schedule *schedule) {
  static const u8 FLOATS[] = {2, 3, 3, 4}, NUMBERS[] = {1, 2, 2, 4};
  schedule->tag = read_tag(reader, 4);
  u64 floats = FLOATS[schedule->tag & 3], numbers = NUMBERS[schedule->tag & 3];
  for (u64 i = 0; i < floats; i++) {
    u64 bits = read_f64(reader);
    __builtin_memcpy(schedule->body + 8 * i, &bits, 8);
  }
  for (u64 i = 0; i < numbers; i++) {
    u32 number = read_u32(reader);
    __builtin_memcpy(schedule->body + 8 * floats + 4 * i, &number, 4);
  }
}

static void read_optional(Reader *reader, OptionalFloat *value) {
  value->is_some = read_tag(reader, 2);
  if (value->is_some) value->bits = read_f32(reader);
}

static NOINLINE void read_optimizer(Reader *reader, Optimizer *optimizer) {
  optimizer->tag = read_tag(reader, 3);
  if (optimizer->tag == OPTIMIZER_ADAMW) {
    AdamW *adamw = &optimizer->adamw;
    adamw->betas[0] = read_f32(reader);
    adamw->betas[1] = read_f32(reader);
    adamw->weight_decay = read_f32(reader);
    adamw->eps = read_f32(reader);
    read_optional(reader, &adamw->clip_grad_norm);
  } else if (optimizer->tag == OPTIMIZER_DISTRO) {
    Distro *distro = &optimizer->distro;
    read_optional(reader, &distro->clip_grad_norm);
    read_optional(reader, &distro->weight_decay);
    distro->compression_decay = read_f32(reader);
    distro->compression_topk = read_u16(reader);
    distro->compression_chunk = read_u16(reader);
    distro->quantize_1bit = read_tag(reader, 2);
  }
}

NOINLINE void read_model(Reader *reader, Model *model) {
  fill_zero(model, sizeof *model);
  model->tag = read_tag(reader, 1);
  model->max_seq_len = read_u32(reader);
  model->cold_start_warmup_steps = read_u32(reader);
  model->architecture = read_tag(reader, 4);
  read_checkpoint(reader, &model->checkpoint);
  model->data_type = read_tag(reader, 2);
  read_data_location(reader, &model->data_location);
  read_schedule(reader, &model->schedule);
  read_optimizer(reader, &model->optimizer);
}
