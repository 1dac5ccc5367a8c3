-- The JSON Schema of the config file, made from the table of keys (_config.sql) and the words below.
-- Called by whoever keeps pgpark/scheduler-config.schema.json, which `pgpark config schema` prints and editors use.

-- What each key of a config is for: its meaning, the default where it has one, and an example.
create or replace function pgpark._config_words()
returns table (path text, description text, default_value jsonb, example jsonb)
language sql immutable
as $$
  values
    ('max_units', 'Units that may be in use at once.', null::jsonb, '24'::jsonb),
    ('max_queue_depth', 'Most tasks that may wait; more are refused as queue_full.', null, '10000'),
    ('default_timeout_secs', 'Seconds until a task that brings no deadline must have started.', null, '60'),
    ('resource_kind', 'What a unit is a slice of; for people.', null, '"gpu_vram"'),
    ('max_bypass', 'How many later tasks may start past a head that does not fit, in its whole life.', '0', '16'),
    ('overflow', 'What a full lot does: reject the newcomer, or drop its lowest ranked task for one of higher priority.',
     '"reject"', '"drop_lowest"'),
    ('fairness', 'Within a priority: fifo, or tenants take turns by the units they use.', '"fifo"', '"tenant"'),
    ('tenants', 'Shares and limits of tenants, by name; "" names tasks without a tenant.', null,
     '{"acme": {"weight": 2, "max_units": 8}}'),
    ('tenants.*', 'One tenant.', null, null),
    ('tenants.*.weight', 'A tenant with weight 2 gets twice the units of one with 1.', '1', '2'),
    ('tenants.*.max_units', 'Units of the pool that this tenant may hold at once; others pass its tasks meanwhile.', null, '8'),
    ('database', 'The DSN of the Postgres where this pool lives. Keep its password in a variable.', null,
     '"postgresql://app:${PGPASSWORD}@db.example.com/park"'),
    ('lease_secs', 'A worker that sends no heartbeat for so many seconds has lost its tasks.', '30', '60'),
    ('run_timeout_secs', 'A task that runs for more seconds is stopped, and has failed.', null, '600'),
    ('scheduling_slack_secs', 'A task whose deadline is fewer seconds away is refused at once.', '0', '0.5'),
    ('archive', 'Keep the payloads of ended tasks in the archive of the queue instead of deleting them.', 'false', 'true'),
    ('max_payload_kb', 'The most KiB that a payload or a result may take as JSON: a larger payload is refused as '
     'payload_too_large, and an attempt with a larger result has failed.', null, '1024'),
    ('audit', 'Write down what happens to each task, and when, for park_audit.', 'false', 'true'),
    ('audit_days', 'Days that the audit is kept, at least: as long as the pool says that wants it longest. By default 30.',
     null, '365'),
    ('retry', 'What happens after a failed attempt, or a lost worker.', null, null),
    ('retry.max_attempts', 'How often a task may be tried before a failure is final.', '1', '3'),
    ('retry.max_losses', 'How many workers a task may lose before it is dropped.', '3', '5'),
    ('retry.backoff_secs', 'Seconds before the first retry.', '1', '5'),
    ('retry.backoff_factor', 'By how much each further pause is longer.', '2', '3'),
    ('retry.max_backoff_secs', 'Most seconds between two attempts.', '300', '3600'),
    ('queue', 'Where the payloads of waiting tasks are kept.', null, '{"type": "postgres_pgmq"}'),
    ('queue.type', 'in_memory: not kept over a crash. postgres_pgmq: a queue of pgmq. postgres_custom: a plain table. '
     'yaque: an embedded Postgres in a folder.', '"postgres_pgmq"', '"yaque"'),
    ('queue.queue_name', 'Name of the pgmq queue; by default that of the pool.', null, '"llm_inference"'),
    ('queue.table', 'Name of the table; by default the name of the pool and _payloads.', null,
     '"my_queue"'),
    ('queue.path', 'Folder of the embedded Postgres, seen from the folder of this file.', null, '"./data/queues"'),
    ('queue.stream', 'Name of the queue in the embedded Postgres; by default that of the pool.', null, '"tauri_llm"'),
    ('mailbox', 'Where outcomes are kept, and who is told of them.', null, null),
    ('mailbox.ttl_secs', 'Seconds that an outcome is kept; by default until it is taken out.', null, '604800'),
    ('mailbox.storage', 'Where outcomes are kept.', null, '{"type": "in_memory"}'),
    ('mailbox.storage.type', 'in_memory: not kept over a crash. postgres: kept.', '"postgres"', '"in_memory"'),
    ('mailbox.storage.table', 'Name of the table of outcomes; several pools may share it.', '"mailbox_messages"',
     '"pl_mailbox_messages"'),
    ('mailbox.notifier', 'Who is called when an outcome lands.', null, null),
    ('mailbox.notifier.type', 'How to call.', '"http"', '"http"'),
    ('mailbox.notifier.base_url', 'Outcomes of tasks with a tenant are posted there.', null, '"https://gateway.example.com/hooks/mailbox"'),
    ('mailbox.notifier.auth_header', 'The Authorization header of callbacks. Keep its token in a variable.', null,
     '"Bearer ${GATEWAY_TOKEN}"'),
    ('mailbox.notifier.timeout_secs', 'Seconds that a callback may take.', '10', '30'),
    ('mailbox.notifier.max_attempts', 'How often a callback is tried before it becomes a dead letter.', '20', '8'),
    ('cost_model', 'Turns tokens of a language-model request into units: park_llm_units.', null, null),
    ('cost_model.model_vram_gb', 'GiB of weights that every request loads. With kv_per_token_mb and max_batch_tokens.', null,
     '14'),
    ('cost_model.kv_per_token_mb', 'MiB of cache that a token takes.', null, '0.5'),
    ('cost_model.max_batch_tokens', 'Most tokens of a request that count.', null, '8192'),
    ('cost_model.gpu_vram_total_gb', 'GiB that the card has; max_units follows from it where it is left out.', null, '24'),
    ('cost_model.gpu_overhead_gb', 'GiB that are taken before any request.', '0', '1'),
    ('cost_model.weights_gb', 'GiB of weights that are loaded once, for all requests.', null, '15'),
    ('cost_model.num_hidden_layers', 'Layers with a KV cache, as in the config.json of the model.', null, '32'),
    ('cost_model.num_key_value_heads', 'Key and value heads of a layer, as in config.json.', null, '8'),
    ('cost_model.head_dim', 'Size of a head, as in config.json or hidden_size / num_attention_heads.', null, '128'),
    ('cost_model.kv_lora_rank', 'For MLA instead of heads: the size of the latent, as in config.json.', null, '512'),
    ('cost_model.qk_rope_head_dim', 'For MLA: the size of the rotary part, as in config.json.', null, '64'),
    ('cost_model.kv_bytes', 'Bytes of a number in the cache: 2 for bf16 and fp16, 1 for fp8.', '2', '1'),
    ('cost_model.block_tokens', 'Tokens of a block, in which the server allots the cache.', '16', '32'),
    ('cost_model.unit_mb', 'MiB of a unit of this pool.', '1', '64'),
    ('cost_model.gpu_memory_utilization', 'Part of the card that the server may use.', '0.9', '0.85');
$$;

create or replace function pgpark.park_config_schema() returns json
language plpgsql stable
security definer
set search_path = pgpark, pg_temp
as $$
begin
  return json_build_object(
    '$schema', 'https://json-schema.org/draft/2020-12/schema',
    'title', 'scheduler-config.json of pgpark',
    'type', 'object',
    'required', json_build_array('pools'),
    'additionalProperties', false,
    'properties', json_build_object(
      '$schema', json_build_object('type', 'string'),
      'pools', json_build_object(
        'description', 'The pools, by name.',
        'type', 'object',
        'propertyNames', json_build_object('pattern', '^[a-z0-9_]{1,40}$'),
        'additionalProperties', pgpark._schema_of_group(''))),
    '$defs', json_build_object(
      'variables', json_build_object(
        'description', 'A variable of the environment, such as ${GPU_UNITS} or ${GPU_UNITS:-24}.',
        'type', 'string',
        'pattern', E'^(\\$\\{[A-Za-z_][A-Za-z0-9_]*(:-[^}]*)?\\})+$'),
      'text_with_variables', json_build_object('type', 'string', 'pattern', E'\\$\\{')));
end
$$;

comment on function pgpark.park_config_schema is
'The JSON Schema (draft 2020-12) of the config file: every key with its type, its least value, its meaning, its default and
an example. writeOnly marks secrets.';

-- The schema of an object of the config: its path, or '' for the pool itself.
create or replace function pgpark._schema_of_group(group_ text) returns json
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  required text[] := case _schema_of_group.group_
                       when 'mailbox.notifier' then array['base_url']
                       else '{}' end;
  usual_type text := (select w.default_value #>> '{}' from pgpark._config_words() w
                      where w.path = _schema_of_group.group_ || '.type');
  members json;
  rules json;
begin
  select json_object_agg(substring(k.path from '[^.]*$'), pgpark._schema_of_key(k.path) order by k.ordinality),
         json_agg(json_build_object(
           'if', json_strip_nulls(json_build_object(
             'properties', json_build_object('type', json_build_object('enum', k.types)),
             'required', case when not usual_type = any (k.types) then array['type'] end)),
           'else', json_build_object(
             'properties', json_build_object(substring(k.path from '[^.]*$'), false)))
           order by k.ordinality) filter (where k.types is not null)
  into members, rules
  from pgpark._config_keys() with ordinality k
  where k.path not like '%*'
    and coalesce(substring(k.path from '^(.*)[.]'), '') = _schema_of_group.group_;
  return json_strip_nulls(json_build_object(
    'type', 'object',
    'required', case when cardinality(required) > 0 then to_json(required) end,
    'additionalProperties', case
                              when members is null then pgpark._schema_of_group(_schema_of_group.group_ || '.*')
                              else 'false' end,
    'properties', members,
    'anyOf', case _schema_of_group.group_ when '' then json_build_array(
      json_build_object('required', json_build_array('max_units')),
      json_build_object('required', json_build_array('cost_model'), 'properties', json_build_object(
        'cost_model', json_build_object('required', json_build_array('gpu_vram_total_gb'))))) end,
    'allOf', rules));
end
$$;

-- The schema of one key with its words. A variable of the environment may stand for a value of any kind, and null for
-- a key that is left out.
create or replace function pgpark._schema_of_key(path text) returns json
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  given record;
  value json;
begin
  select k.kind, k.least_value, k.choices, w.description, w.default_value, w.example into given
  from pgpark._config_keys() k
  left join pgpark._config_words() w using (path)
  where k.path = _schema_of_key.path;
  value := case
    when given.kind = 'object' then pgpark._schema_of_group(_schema_of_key.path)
    when given.kind in ('integer', 'number') then json_build_object(
      'type', given.kind, 'minimum', given.least_value, 'maximum', 1000000000)
    when given.kind = 'boolean' then json_build_object('type', 'boolean')
    when given.kind = 'word' then json_build_object('enum', given.choices)
    else json_strip_nulls(json_build_object('type', 'string', 'minLength', 1, 'pattern', case given.kind
      when 'queue' then '^[a-z0-9_]{1,47}$'
      when 'table' then '^[a-z_][a-z0-9_]{0,62}$'
      when 'header' then '^[!-~]([ -~]*[!-~])?$'
      when 'url' then E'^https?://[^\\s/?#@]+(/[^\\s?#]*)?$' end))
  end;
  return json_strip_nulls(json_build_object(
    'description', given.description,
    'default', given.default_value,
    'examples', case when given.example is not null then json_build_array(given.example) end,
    'writeOnly', case when given.kind in ('secret', 'header') then true end,
    'anyOf', case
      when given.kind = 'object' then json_build_array(value, json_build_object('type', 'null'))
      else json_build_array(
        value,
        json_build_object('$ref', case
          when given.kind in ('integer', 'number', 'boolean') then '#/$defs/variables'
          else '#/$defs/text_with_variables' end),
        json_build_object('type', 'null')) end));
end
$$;
