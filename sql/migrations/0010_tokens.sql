-- Tokens: what callers of a gateway carry, since they have no login of the database. docs/decisions/0020.
--
-- token       a token, by the SHA-256 of its secret; the secret itself is nowhere
-- token_use   how far each has used up its limit, and when it was last used; unlogged: lost in a crash, and no great loss

create table pgpark.token (
  name             text collate "C" primary key,
  hash             text collate "C" not null unique check (hash ~ '^[0-9a-f]{64}$'),
  kinds            text[] not null check (cardinality(kinds) > 0 and kinds <@ '{producer,worker,reader,admin}'),
  tenants          text[] check (cardinality(tenants) > 0),
  pools            text[] check (cardinality(pools) > 0),
  requests_per_sec double precision check (requests_per_sec > 0),
  burst            int check (burst >= 1),
  created_at       timestamptz not null,
  expires_at       timestamptz,
  check (tenants is null or 'producer' = any (kinds)),
  check (pools is null or 'admin' <> all (kinds)),
  check ((requests_per_sec is null) = (burst is null))
);

create unlogged table pgpark.token_use (
  hash       text collate "C" primary key references pgpark.token (hash) on delete cascade,
  next_at    timestamptz not null default '-infinity',
  used_at    timestamptz not null
)
with (fillfactor = 50);

create type pgpark.followed as (
  message_id bigint,
  task_id    bigint,
  pool       text,
  tenant     text,
  user_id    text,
  session_id text,
  status     text,
  reason     text,
  payload    jsonb,
  created_at timestamptz,
  bookmark   text
);

comment on table pgpark.token is 'What a caller of a gateway may do. Null tenants or pools: any; null requests_per_sec: no limit.';
comment on column pgpark.token.hash is 'The SHA-256 of the secret, as 64 hexadecimal digits.';
comment on column pgpark.token.burst is 'How many requests may come at once before requests_per_sec holds.';
comment on table pgpark.token_use is 'Written for each request of a token with a limit, else about once a minute.';
comment on column pgpark.token_use.next_at is 'When a request is due that keeps exactly to requests_per_sec.';
comment on type pgpark.followed is 'A row of park_follow.';
