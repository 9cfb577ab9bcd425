// What an owner configures: from its borsh form to the form that it has in the account.
#pragma once
#include "common/borsh.h"
#include "machine/layout.h"

void read_metadata(Reader *reader, Metadata *metadata);
void read_config(Reader *reader, Config *config);
void read_progress(Reader *reader, Progress *progress);
void read_checkpoint(Reader *reader, CheckpointSource *checkpoint);
void read_model(Reader *reader, Model *model);
