// Checks of what the owner configures (Psyche's coordinator.rs and model.rs), and how the checkpoint's source changes.
#include "machine/run.h"

bool config_is_sane(const Config *config) {
  u64 witnesses = within(config->min_clients, MAX_WITNESSES);
  return config->epoch_time > 0 && config->warmup_time > 0 && config->warmup_time < config->epoch_time &&
         config->max_round_train_time > 0 && config->max_round_train_time < config->epoch_time &&
         config->round_witness_time > 0 && config->cooldown_time > 0 && config->waiting_for_members_extra_time > 0 &&
         config->min_clients > 0 && config->init_min_clients >= config->min_clients &&
         config->init_min_clients <= MAX_CLIENTS && config->witness_nodes <= witnesses &&
         config->global_batch_size_start > 0 && config->global_batch_size_end >= config->global_batch_size_start &&
         // One more than all steps must be a step, too.
         config->total_steps > 0 && config->total_steps < UINT32_MAX &&
         // Verifiers do not exist yet.
         config->verification_percent == 0;
}

static bool data_is_sane(const DataLocation *data) {
  switch (data->tag) {
    case DATA_SERVER: return data->server[0] != 0;
    case DATA_WEIGHTED_HTTP:
    case DATA_PREPROCESSED: return data->text[0] != 0;
    case DATA_HTTP: break;
    default: return true;
  }
  switch (data->http.location_tag) {
    case HTTP_SINGLE_URL: return data->http.location.url[0] != 0;
    case HTTP_NUMBERED_FILES:
      return data->http.location.files.url_template[0] != 0 && data->http.location.files.num_files != 0;
    default: return data->http.location.gcp.bucket[0] != 0;
  }
}

bool model_is_sane(const Model *model) {
  const CheckpointSource *checkpoint = &model->checkpoint;
  bool found = checkpoint->tag == CHECKPOINT_DUMMY || (checkpoint->tag > CHECKPOINT_DUMMY && checkpoint->name[0] != 0);
  return model->max_seq_len != 0 && data_is_sane(&model->data_location) && found &&
         model->optimizer.tag != OPTIMIZER_DUMMY;
}

bool cold_start_fits(const Config *config, const Model *model) {
  if (model->cold_start_warmup_steps == 0) return true;
  if (config->max_round_train_time == 0 || config->epoch_time < config->warmup_time) return false;
  return model->cold_start_warmup_steps <= (config->epoch_time - config->warmup_time) / config->max_round_train_time;
}

// Below 2^63: no sum of the run's batches, 2^32 of at most 2^16, overflows.
bool progress_is_sane(const Progress *progress) {
  return progress->step > 0 && progress->epoch_start_data_index < 1ull << 63;
}

void checkpoint_to_peers(CheckpointSource *checkpoint) {
  if (checkpoint->tag == CHECKPOINT_HUB || checkpoint->tag == CHECKPOINT_DUMMY) checkpoint->tag = CHECKPOINT_P2P;
  if (checkpoint->tag == CHECKPOINT_GCS) checkpoint->tag = CHECKPOINT_P2P_GCS;
}

bool replace_checkpoint(CheckpointSource *checkpoint, const CheckpointSource *offered) {
  u32 current = checkpoint->tag;
  bool peers = current == CHECKPOINT_P2P || current == CHECKPOINT_P2P_GCS;
  if (offered->tag == CHECKPOINT_HUB && (peers || current == CHECKPOINT_HUB)) {
    *checkpoint = *offered;
    if (peers) checkpoint->tag = CHECKPOINT_P2P;
    return true;
  }
  if (offered->tag == CHECKPOINT_GCS && (peers || current == CHECKPOINT_GCS)) {
    *checkpoint = *offered;
    if (peers) checkpoint->tag = CHECKPOINT_P2P_GCS;
    return true;
  }
  return false;
}
