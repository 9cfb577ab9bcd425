// The coordinator account: Psyche's layout, byte for byte, read in place. Its unused elements and its padding are zero.
#pragma once
#include "common/types.h"

#ifndef SMALL_LAYOUT
#define MAX_CLIENTS 256
#define MAX_WITNESSES 32
#else  // for the fuzzer, which then reaches the limits of the lists
#define MAX_CLIENTS 6
#define MAX_WITNESSES 3
#endif
#define STORED_ROUNDS 4
#define BLOOM_KEYS 8
#define BLOOM_WORDS 16
#define MAX_RUN_ID 32

#define COORDINATOR_DISCRIMINATOR 0x2b569b2c37b121efull  // S("account:CoordinatorAccount")[:8]
#define COORDINATOR_VERSION 1

// RunState; Psyche's cool-down is not used.
enum { UNINITIALIZED, WAITING_FOR_MEMBERS, WARMUP, ROUND_TRAIN, ROUND_WITNESS, COOLDOWN, FINISHED, PAUSED };
// ClientState
enum { HEALTHY, DROPPED, WITHDRAWN, EJECTED };
// Committee
enum { TIE_BREAKER, VERIFIER, TRAINER };
// Model tags
enum { CHECKPOINT_EPHEMERAL, CHECKPOINT_DUMMY, CHECKPOINT_HUB, CHECKPOINT_P2P, CHECKPOINT_GCS, CHECKPOINT_P2P_GCS };
enum { DATA_DUMMY, DATA_SERVER, DATA_LOCAL, DATA_HTTP, DATA_WEIGHTED_HTTP, DATA_PREPROCESSED };
enum { HTTP_SINGLE_URL, HTTP_NUMBERED_FILES, HTTP_GCP };
enum { SCHEDULE_CONSTANT, SCHEDULE_LINEAR, SCHEDULE_COSINE, SCHEDULE_WARMUP_STABLE_DECAY };
enum { OPTIMIZER_DUMMY, OPTIMIZER_ADAMW, OPTIMIZER_DISTRO };

typedef struct {
  u8 name[64];
  u8 description[280];
  u64 num_parameters;
  u64 vocab_size;
} Metadata;

typedef struct {
  u32 tag;
  u8 has_prefix;  // or revision
  u8 prefix[64];
  u8 name[64];  // repo_id or bucket
  u8 padding[3];
} CheckpointSource;

typedef struct {
  u8 bucket[64];
  u8 directory[192];
} GcpFolder;

typedef struct {
  u8 url_template[64];
  u32 start_index;
  u8 left_pad_zeros;
  u8 padding[3];
  u32 num_files;
} NumberedFiles;

typedef struct {
  u32 location_tag;
  union {
    u8 url[192];
    NumberedFiles files;
    GcpFolder gcp;
  } location;
  u32 token_size;
  u32 shuffle_tag;
  u8 seed[32];
} HttpData;

typedef struct {
  u32 tag;
  union {
    u8 server[64];
    u8 text[192];  // Local, WeightedHttp, Preprocessed
    HttpData http;
  };
} DataLocation;

typedef struct {
  u32 tag;
  u32 padding;
  u8 body[48];  // the floats, then the u32 fields
} Schedule;

typedef struct {
  u32 is_some;
  u32 bits;
} OptionalFloat;

typedef struct {
  OptionalFloat clip_grad_norm;
  OptionalFloat weight_decay;
  u32 compression_decay;
  u16 compression_topk;
  u16 compression_chunk;
  u8 quantize_1bit;
  u8 padding[3];
} Distro;

typedef struct {
  u32 betas[2];
  u32 weight_decay;
  u32 eps;
  OptionalFloat clip_grad_norm;
} AdamW;

typedef struct {
  u32 tag;
  union {
    Distro distro;
    AdamW adamw;
  };
} Optimizer;

typedef struct {
  u32 tag;  // 0, the only variant: LLM
  u32 padding;
  u32 max_seq_len;
  u32 cold_start_warmup_steps;
  u32 architecture;
  CheckpointSource checkpoint;
  u32 data_type;
  DataLocation data_location;
  Schedule schedule;
  Optimizer optimizer;
} Model;

// The order and widths are those of its borsh form, too.
typedef struct {
  u64 warmup_time;
  u64 cooldown_time;
  u64 max_round_train_time;
  u64 round_witness_time;
  u64 global_batch_size_warmup_tokens;
  u64 epoch_time;
  u32 total_steps;
  u16 init_min_clients;
  u16 min_clients;
  u16 witness_nodes;
  u16 global_batch_size_start;
  u16 global_batch_size_end;
  u8 verification_percent;
  u8 waiting_for_members_extra_time;
} Config;

typedef struct {
  u16 epoch;
  u16 padding;
  u32 step;
  u64 epoch_start_data_index;
} Progress;

typedef struct {
  u64 keys[BLOOM_KEYS];
  u64 bits[BLOOM_WORDS];
} Bloom;

typedef struct {
  u64 position;
  u64 index;
  u8 witness;
  u8 padding[7];
  Bloom participants;
  Bloom broadcasts;
  Key merkle;
} Witness;

typedef struct {
  Witness witnesses[MAX_WITNESSES];
  u64 witnesses_length;
  u64 data_index;
  u64 seed;
  u32 height;
  u16 clients_length;
  u16 tie_breaker_tasks;
} Round;

typedef struct {
  Key signer;
  Key p2p;
  u8 state;
  u8 place;  // among the members; padding in Psyche's layout
  u8 padding[2];
  u32 exited_height;
} Client;

typedef struct {
  Client items[MAX_CLIENTS];
  u64 length;
} ClientList;

// A wallet that ever joined.
typedef struct {
  Key signer;
  Key p2p;
  u64 unused;
  u64 earned;
  u64 slashed;
  u64 active;
} Member;

typedef struct {
  u64 earning_total_shared;
  u64 slashing_per_client;
} Rates;

typedef struct {
  u64 discriminator;
  u64 version;
  Metadata metadata;
  u8 run_id[MAX_RUN_ID];
  u8 run_state;
  u8 padding0[7];
  Model model;
  Config config;
  Progress progress;
  Round rounds[STORED_ROUNDS];
  ClientList clients;
  ClientList exited;
  u32 rounds_head;
  u32 start_step;
  u32 last_step;
  u32 padding1;
  u64 epoch_start;
  u8 first_round;
  u8 cold_start_epoch;
  u8 padding2[6];
  u64 phase_start;
  u8 pending_pause;
  u8 padding3[7];
  Member members[MAX_CLIENTS];
  u64 members_length;
  u64 next_active;
  Rates current_rates;
  Rates future_rates;
  u8 is_warmup_first_tick;
  u8 is_training_first_tick;
  u8 client_version[96];
  u8 padding4[6];
  u64 nonce;
} Coordinator;

#ifndef SMALL_LAYOUT
#define AT(type, field, offset) _Static_assert(offsetof(type, field) == (offset), #type "." #field)
#define SIZE(type, size) _Static_assert(sizeof(type) == (size), #type)
#else
#define AT(type, field, offset) _Static_assert(true, "")
#define SIZE(type, size) _Static_assert(true, "")
#endif
SIZE(Coordinator, 119160);
AT(Coordinator, version, 8);
AT(Coordinator, metadata, 16);
AT(Coordinator, metadata.description, 80);
AT(Coordinator, metadata.num_parameters, 360);
AT(Coordinator, metadata.vocab_size, 368);
AT(Coordinator, run_id, 376);
AT(Coordinator, run_state, 408);
AT(Coordinator, model, 416);
AT(Coordinator, model.max_seq_len, 424);
AT(Coordinator, model.cold_start_warmup_steps, 428);
AT(Coordinator, model.architecture, 432);
AT(Coordinator, model.checkpoint, 436);
AT(Coordinator, model.checkpoint.has_prefix, 440);
AT(Coordinator, model.checkpoint.name, 505);
AT(Coordinator, model.data_type, 572);
AT(Coordinator, model.data_location, 576);
AT(Coordinator, model.data_location.http, 580);
AT(Coordinator, model.data_location.http.location, 584);
AT(Coordinator, model.data_location.http.location.gcp.directory, 648);
AT(Coordinator, model.data_location.http.location.files.start_index, 648);
AT(Coordinator, model.data_location.http.location.files.left_pad_zeros, 652);
AT(Coordinator, model.data_location.http.location.files.num_files, 656);
AT(Coordinator, model.data_location.http.token_size, 840);
AT(Coordinator, model.data_location.http.shuffle_tag, 844);
AT(Coordinator, model.data_location.http.seed, 848);
AT(Coordinator, model.schedule, 880);
AT(Coordinator, model.schedule.body, 888);
AT(Coordinator, model.optimizer, 936);
AT(Coordinator, model.optimizer.distro, 940);
AT(Coordinator, model.optimizer.distro.weight_decay, 948);
AT(Coordinator, model.optimizer.distro.compression_decay, 956);
AT(Coordinator, model.optimizer.distro.compression_topk, 960);
AT(Coordinator, model.optimizer.distro.compression_chunk, 962);
AT(Coordinator, model.optimizer.distro.quantize_1bit, 964);
AT(Coordinator, model.optimizer.adamw.weight_decay, 948);
AT(Coordinator, model.optimizer.adamw.eps, 952);
AT(Coordinator, model.optimizer.adamw.clip_grad_norm, 956);
AT(Coordinator, config, 968);
AT(Coordinator, config.cooldown_time, 976);
AT(Coordinator, config.max_round_train_time, 984);
AT(Coordinator, config.round_witness_time, 992);
AT(Coordinator, config.global_batch_size_warmup_tokens, 1000);
AT(Coordinator, config.epoch_time, 1008);
AT(Coordinator, config.total_steps, 1016);
AT(Coordinator, config.init_min_clients, 1020);
AT(Coordinator, config.min_clients, 1022);
AT(Coordinator, config.witness_nodes, 1024);
AT(Coordinator, config.global_batch_size_start, 1026);
AT(Coordinator, config.global_batch_size_end, 1028);
AT(Coordinator, config.verification_percent, 1030);
AT(Coordinator, config.waiting_for_members_extra_time, 1031);
AT(Coordinator, progress, 1032);
AT(Coordinator, progress.step, 1036);
AT(Coordinator, progress.epoch_start_data_index, 1040);
AT(Coordinator, rounds, 1048);
SIZE(Round, 14112);
AT(Round, witnesses_length, 14080);
AT(Round, data_index, 14088);
AT(Round, seed, 14096);
AT(Round, height, 14104);
AT(Round, clients_length, 14108);
AT(Round, tie_breaker_tasks, 14110);
SIZE(Witness, 440);
AT(Witness, index, 8);
AT(Witness, witness, 16);
AT(Witness, participants, 24);
AT(Witness, broadcasts, 216);
AT(Witness, merkle, 408);
AT(Coordinator, clients, 57496);
SIZE(Client, 72);
AT(Client, state, 64);
AT(Client, place, 65);
AT(Client, exited_height, 68);
AT(Coordinator, clients.length, 75928);
AT(Coordinator, exited, 75936);
AT(Coordinator, rounds_head, 94376);
AT(Coordinator, start_step, 94380);
AT(Coordinator, last_step, 94384);
AT(Coordinator, epoch_start, 94392);
AT(Coordinator, first_round, 94400);
AT(Coordinator, cold_start_epoch, 94401);
AT(Coordinator, phase_start, 94408);
AT(Coordinator, pending_pause, 94416);
AT(Coordinator, members, 94424);
SIZE(Member, 96);
AT(Member, earned, 72);
AT(Coordinator, members_length, 119000);
AT(Coordinator, next_active, 119008);
AT(Coordinator, current_rates, 119016);
AT(Coordinator, future_rates, 119032);
AT(Coordinator, is_warmup_first_tick, 119048);
AT(Coordinator, is_training_first_tick, 119049);
AT(Coordinator, client_version, 119050);
AT(Coordinator, nonce, 119152);
