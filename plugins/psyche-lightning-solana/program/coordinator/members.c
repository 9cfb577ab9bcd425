// Who takes part: joining, leaving, and where a node can be reached.
#include "coordinator/context.h"

enum { JOIN_USER, AUTHORIZATION, JOIN_INSTANCE, JOIN_COORDINATOR, JOIN_MANIFEST, NODE, JOIN_ACCOUNTS };

// The node signs, too: nobody joins with the node key of another.
NOINLINE u64 join_run(Input *input) {
  Context context;
  Key signer, p2p;
  Reader fields = reader(input->data, input->data_length);
  read_key(&fields, &signer);
  read_key(&fields, &p2p);
  TRY(ended(&fields));
  TRY(need_accounts(input, JOIN_ACCOUNTS));
  TRY(open_context(&context, input, JOIN_INSTANCE, 0));
  const Slice scope = TEXT("CoordinatorJoinRun");
  TRY(need_authorization(&context, &input->accounts[AUTHORIZATION], &context.join_authority, &scope));
  const Account *node = &input->accounts[NODE];
  TRY(need_signer(node, "node"));
  REQUIRE(same_key(&signer, context.user->key) && same_key(&p2p, node->key), SignerMismatch);
  TRY(join(&context.run, &signer, &p2p));
  if (!halted(&context.run)) settle(&context.run);
  return close_context(&context);
}

NOINLINE u64 withdraw_from_run(Input *input) {
  Context context;
  Reader fields = reader(input->data, input->data_length);
  TRY(ended(&fields));
  TRY(open_context(&context, input, 1, 0));
  TRY(leave(&context.run, context.user->key, WITHDRAWN));
  if (!halted(&context.run)) settle(&context.run);
  return close_context(&context);
}

// Who decides who may join also removes somebody at once.
NOINLINE u64 kick(Input *input) {
  Context context;
  Key signer;
  Reader fields = reader(input->data, input->data_length);
  read_key(&fields, &signer);
  TRY(ended(&fields));
  TRY(open_context(&context, input, 1, JOIN_AUTHORITY));
  TRY(leave(&context.run, &signer, EJECTED));
  if (!halted(&context.run)) settle(&context.run);
  return close_context(&context);
}

#define ADDRESS_DISCRIMINATOR 0x781875d4dc96337bull  // S("account:NodeAddress")[:8]

typedef struct {
  u64 discriminator;
  u8 bump;
  u8 padding[7];
  Key wallet;
  u16 length;
  u8 address[126];
} NodeAddress;

SIZE(NodeAddress, 176);
AT(NodeAddress, address, 50);

static NOINLINE u64 make_address(const Context *context, Account *account) {
  const Account *user = context->user;
  Derivation derivation = {{TEXT("address"), context->run_id, {user->key, 32}}, 3, 0};
  TRY(create_derived(context->input, user, account, &derivation, sizeof(NodeAddress)));
  NodeAddress *address = (NodeAddress *)account->data;
  address->discriminator = ADDRESS_DISCRIMINATOR;
  address->bump = derivation.bump;
  address->wallet = *user->key;
  return 0;
}

static NOINLINE u64 check_address(const Input *input, const Account *account) {
  TRY(need_writable(account, "address"));
  TRY(need_owned(account, input->program, ADDRESS_DISCRIMINATOR, sizeof(NodeAddress), "address"));
  const NodeAddress *address = (const NodeAddress *)account->data;
  return need_key(&input->accounts[0], &address->wallet, "address");
}

// An address is given up whether or not its run still exists, so that its rent comes back.
static NOINLINE u64 give_up_address(Input *input, Account *account) {
  if (same_key(account->owner, &SYSTEM_PROGRAM)) return 0;
  TRY(check_address(input, account));
  return close_account(account, &input->accounts[0]);
}

static NOINLINE u64 check_place(const Context *context, Account *account) {
  TRY(check_address(context->input, account));
  const NodeAddress *address = (const NodeAddress *)account->data;
  Slice seeds[4] = {TEXT("address"), context->run_id, {context->user->key, 32}, {&address->bump, 1}};
  return need_seeds(account, seeds, COUNT(seeds), context->input->program, "address");
}

// Where the user's transport reaches it in this run; an empty address closes the account.
NOINLINE u64 set_address(Input *input) {
  Context context;
  Slice text;
  Account *user = &input->accounts[0], *account = &input->accounts[1];
  Reader fields = reader(input->data, input->data_length);
  read_string(&fields, sizeof ((NodeAddress *)0)->address, &text);
  TRY(ended(&fields));
  TRY(need_accounts(input, 4));
  TRY(need_signer(user, "user"));
  TRY(need_writable(user, "user"));
  if (text.length == 0) return give_up_address(input, account);
  TRY(open_instance(&context, input, 2, 0));
  TRY(need_program(&input->accounts[3], &SYSTEM_PROGRAM, "system_program"));
  bool exists = !same_key(account->owner, &SYSTEM_PROGRAM);
  TRY((exists ? check_place : make_address)(&context, account));
  NodeAddress *address = (NodeAddress *)account->data;
  address->length = (u16)text.length;
  fill_zero(address->address, sizeof address->address);
  copy(address->address, text.at, text.length);
  return 0;
}
