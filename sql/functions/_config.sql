-- The config of a pool: which keys there are, what each may be, and the settings that a config gives.
-- Called by park_put_pool. The keys are those of DESIGN section 7; the config file has them below pools.NAME.

-- The settings that a checked config gives, defaults filled in.
create or replace function pgpark._configured(name text, config jsonb) returns pgpark.pool
language plpgsql immutable
set search_path = pgpark, pg_temp
as $$
declare
  lot pgpark.pool;
begin
  lot.name := _configured.name;
  lot.config := pgpark._without_secrets(config);
  lot.max_units := coalesce((config ->> 'max_units')::numeric::int,
                            pgpark._llm_max_units(nullif(config -> 'cost_model', 'null')));
  lot.max_queue_depth := (config ->> 'max_queue_depth')::numeric::int;
  lot.default_timeout_secs := (config ->> 'default_timeout_secs')::double precision;
  lot.resource_kind := config ->> 'resource_kind';
  lot.overflow := coalesce(config ->> 'overflow', 'reject');
  lot.fairness := coalesce(config ->> 'fairness', 'fifo');
  lot.limited := coalesce(jsonb_path_exists(config, '$.tenants.*.max_units ? (@ != null)'), false);
  lot.max_bypass := coalesce((config ->> 'max_bypass')::numeric::int, 0);
  lot.lease_secs := coalesce(config ->> 'lease_secs', '30')::double precision;
  lot.run_timeout_secs := (config ->> 'run_timeout_secs')::double precision;
  lot.scheduling_slack_secs := coalesce(config ->> 'scheduling_slack_secs', '0')::double precision;
  lot.max_attempts := coalesce((config #>> '{retry,max_attempts}')::numeric::int, 1);
  lot.max_losses := coalesce((config #>> '{retry,max_losses}')::numeric::int, 3);
  lot.backoff_secs := coalesce(config #>> '{retry,backoff_secs}', '1')::double precision;
  lot.backoff_factor := coalesce(config #>> '{retry,backoff_factor}', '2')::double precision;
  lot.max_backoff_secs := coalesce(config #>> '{retry,max_backoff_secs}', '300')::double precision;
  lot.archive := coalesce((config ->> 'archive')::boolean, false);
  lot.mailbox_ttl_secs := (config #>> '{mailbox,ttl_secs}')::double precision;
  lot.max_payload_kb := (config ->> 'max_payload_kb')::numeric::int;
  lot.audit := coalesce((config ->> 'audit')::boolean, false);
  lot.audit_days := (config ->> 'audit_days')::numeric::int;
  lot.notifier := pgpark._notifier(config);
  lot.cost_model := jsonb_strip_nulls(nullif(config -> 'cost_model', 'null'));
  lot.kept_in_memory := 'in_memory' in (config #>> '{queue,type}', config #>> '{mailbox,storage,type}') is true;
  lot.mailbox_type := coalesce(config #>> '{mailbox,storage,type}', 'postgres');
  lot.mailbox_table := case lot.mailbox_type when 'in_memory' then 'mailbox_in_memory'
                            else coalesce(config #>> '{mailbox,storage,table}', 'mailbox_messages') end;
  lot.queue_type := coalesce(config #>> '{queue,type}', 'postgres_pgmq');
  lot.queue_name := case lot.queue_type
                      when 'postgres_custom' then coalesce(config #>> '{queue,table}', _configured.name || '_payloads')
                      when 'yaque' then coalesce(config #>> '{queue,stream}', _configured.name)
                      else coalesce(config #>> '{queue,queue_name}', _configured.name) end;
  return lot;
end
$$;

-- The tenants that a checked config names.
create or replace function pgpark._tenants(config jsonb)
returns table (tenant text, weight double precision, max_units int)
language sql immutable
as $$
  select e.key, coalesce(e.value ->> 'weight', '1')::double precision, (e.value ->> 'max_units')::numeric::int
  from jsonb_each(nullif(config -> 'tenants', 'null')) e
  where e.value <> 'null';
$$;

-- The settings of a pool as a config would give each of them.
create or replace function pgpark._settings(lot pgpark.pool) returns jsonb
language plpgsql immutable
set search_path = pgpark, pg_temp
as $$
begin
  return jsonb_build_object(
    'max_units', lot.max_units, 'max_queue_depth', lot.max_queue_depth,
    'default_timeout_secs', lot.default_timeout_secs, 'resource_kind', lot.resource_kind,
    'max_bypass', lot.max_bypass, 'overflow', lot.overflow, 'fairness', lot.fairness,
    'tenants', (
      select coalesce(jsonb_object_agg(n.tenant, jsonb_build_object('weight', n.weight, 'max_units', n.max_units)), '{}')
      from pgpark._tenants(lot.config) n),
    'lease_secs', lot.lease_secs, 'run_timeout_secs', lot.run_timeout_secs,
    'scheduling_slack_secs', lot.scheduling_slack_secs,
    'retry', jsonb_build_object(
      'max_attempts', lot.max_attempts, 'max_losses', lot.max_losses, 'backoff_secs', lot.backoff_secs,
      'backoff_factor', lot.backoff_factor, 'max_backoff_secs', lot.max_backoff_secs),
    'archive', lot.archive,
    'max_payload_kb', lot.max_payload_kb,
    'audit', lot.audit,
    'audit_days', lot.audit_days,
    'cost_model', lot.cost_model,
    'queue', jsonb_build_object('type', lot.queue_type)
             || case lot.queue_type
                  when 'postgres_custom' then jsonb_build_object('table', lot.queue_name)
                  when 'yaque' then jsonb_build_object('path', lot.config #>> '{queue,path}', 'stream', lot.queue_name)
                  else jsonb_build_object('queue_name', lot.queue_name) end,
    'mailbox', jsonb_build_object(
      'ttl_secs', lot.mailbox_ttl_secs,
      'storage', jsonb_build_object('type', lot.mailbox_type)
                 || case lot.mailbox_type when 'postgres' then jsonb_build_object('table', lot.mailbox_table)
                                          else '{}' end,
      'notifier', lot.notifier || jsonb_build_object('auth_header', lot.config #> '{mailbox,notifier,auth_header}')));
end
$$;

-- What is at the ends of nested objects, by dotted key.
create or replace function pgpark._leaves(settings jsonb) returns table (key text, value jsonb)
language sql immutable
as $$
  with recursive inner_ (key, value) as (
    select e.key, e.value from jsonb_each(settings) e
    union all
    select i.key || '.' || e.key, e.value
    from inner_ i
    cross join lateral jsonb_each(case jsonb_typeof(i.value) when 'object' then i.value end) e
  )
  select i.key, i.value from inner_ i where jsonb_typeof(i.value) <> 'object' or i.value = '{}';
$$;

-- Every key that a config may have: its path, what it takes, the least value, the words it may be, and with which
-- `type` beside it it goes (null: with any). kind `object` holds other keys; `*` stands for any name.
create or replace function pgpark._config_keys()
returns table (path text, kind text, least_value numeric, choices text[], types text[])
language sql immutable
as $$
  values
    ('max_units',              'integer', 1::numeric, null::text[], null::text[]),
    ('max_queue_depth',        'integer', 1, null, null),
    ('default_timeout_secs',   'number',  0.001, null, null),
    ('resource_kind',          'word',    null, array['cpu', 'gpu_vram', 'io', 'mixed'], null),
    ('max_bypass',             'integer', 0, null, null),
    ('overflow',               'word',    null, array['reject', 'drop_lowest'], null),
    ('fairness',               'word',    null, array['fifo', 'tenant'], null),
    ('tenants',                'object',  null, null, null),
    ('tenants.*',              'object',  null, null, null),
    ('tenants.*.weight',       'number',  0.001, null, null),
    ('tenants.*.max_units',    'integer', 1, null, null),
    ('database',               'secret',  null, null, null),
    ('lease_secs',             'number',  0.1, null, null),
    ('run_timeout_secs',       'number',  0.001, null, null),
    ('scheduling_slack_secs',  'number',  0, null, null),
    ('archive',                'boolean', null, null, null),
    ('max_payload_kb',         'integer', 1, null, null),
    ('audit',                  'boolean', null, null, null),
    ('audit_days',             'integer', 1, null, null),
    ('retry',                  'object',  null, null, null),
    ('retry.max_attempts',     'integer', 1, null, null),
    ('retry.max_losses',       'integer', 1, null, null),
    ('retry.backoff_secs',     'number',  0, null, null),
    ('retry.backoff_factor',   'number',  1, null, null),
    ('retry.max_backoff_secs', 'number',  0, null, null),
    ('queue',                  'object',  null, null, null),
    ('queue.type',             'word',    null, array['in_memory', 'postgres_custom', 'postgres_pgmq', 'yaque'], null),
    ('queue.queue_name',       'queue',   null, null, array['in_memory', 'postgres_pgmq']),
    ('queue.table',            'table',   null, null, array['postgres_custom']),
    ('queue.path',             'text',    null, null, array['yaque']),
    ('queue.stream',           'queue',   null, null, array['yaque']),
    ('mailbox',                'object',  null, null, null),
    ('mailbox.ttl_secs',       'number',  0.001, null, null),
    ('mailbox.storage',        'object',  null, null, null),
    ('mailbox.storage.type',   'word',    null, array['in_memory', 'postgres'], null),
    ('mailbox.storage.table',  'table',   null, null, array['postgres']),
    ('mailbox.notifier',       'object',  null, null, null),
    ('mailbox.notifier.type',  'word',    null, array['http'], null),
    ('mailbox.notifier.base_url',     'url',     null, null, null),
    ('mailbox.notifier.auth_header',  'header',  null, null, null),
    ('mailbox.notifier.timeout_secs', 'number',  0.1, null, null),
    ('mailbox.notifier.max_attempts', 'integer', 1, null, null),
    ('cost_model',             'object',  null, null, null),
    ('cost_model.model_vram_gb',     'number',  0, null, null),
    ('cost_model.kv_per_token_mb',   'number',  0, null, null),
    ('cost_model.max_batch_tokens',  'integer', 1, null, null),
    ('cost_model.gpu_vram_total_gb', 'number',  0, null, null),
    ('cost_model.gpu_overhead_gb',   'number',  0, null, null),
    ('cost_model.weights_gb',             'number',  0, null, null),
    ('cost_model.num_hidden_layers',      'integer', 1, null, null),
    ('cost_model.num_key_value_heads',    'integer', 1, null, null),
    ('cost_model.head_dim',               'integer', 1, null, null),
    ('cost_model.kv_lora_rank',           'integer', 1, null, null),
    ('cost_model.qk_rope_head_dim',       'integer', 0, null, null),
    ('cost_model.kv_bytes',               'integer', 1, null, null),
    ('cost_model.block_tokens',           'integer', 1, null, null),
    ('cost_model.unit_mb',                'number',  0.001, null, null),
    ('cost_model.gpu_memory_utilization', 'number',  0.001, null, null);
$$;

-- Raises 22023 naming the first key that is wrong and what would be right. Secrets are not repeated:
-- of what stands where one belongs, or might have slipped to, only numbers are.
create or replace function pgpark._check_config(name text, config jsonb) returns void
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  bad record;
begin
  if jsonb_typeof(config) is distinct from 'object' then
    raise exception 'pools.%: the config must be a JSON object, not %', _check_config.name,
                    coalesce(jsonb_typeof(config), 'NULL')
      using errcode = '22023', hint = 'For example: {"max_units": 24}';
  end if;

  with recursive setting (path, shown, value, dotted, beside) as (
    select e.key, e.key, e.value, e.key like '%.%', null::text
    from jsonb_each(config) e
    union all
    select s.path || '.' || case s.path when 'tenants' then '*' else e.key end, s.shown || '.' || e.key, e.value,
           s.dotted or (e.key like '%.%' and s.path <> 'tenants'),
           coalesce(s.value ->> 'type', case s.path when 'queue' then 'postgres_pgmq' else 'postgres' end)
    from setting s
    join pgpark._config_keys() k on k.path = s.path and k.kind = 'object' and jsonb_typeof(s.value) = 'object'
    cross join lateral jsonb_each(s.value) e
  ),
  checked as (
    select s.shown,
      case
        when k.path is null or s.dotted then pgpark._no_key(s.path, s.dotted)
        when s.path = 'tenants.*' and octet_length(substring(s.shown from 9)) > 255 then
          'is too long a name; a tenant takes at most 255 bytes'
        when s.value = 'null' then null  -- as if it were left out
        when k.kind = 'object' and jsonb_typeof(s.value) <> 'object' then
          format('must be an object, not %s', s.said)
        when k.kind = 'boolean' and jsonb_typeof(s.value) <> 'boolean' then
          format('must be true or false, not %s', s.value)
        when k.kind in ('integer', 'number') and (
               jsonb_typeof(s.value) <> 'number'
               or not (s.value::text::numeric between k.least_value and 1000000000)
               or (s.value::text::numeric > 0 and s.value::text::numeric < 0.000001)
               or (k.kind = 'integer' and s.value::text::numeric % 1 <> 0)) then
          format('must be a %s from %s to 1000000000, not %s',
                 case k.kind when 'integer' then 'whole number' else 'number' end, k.least_value, s.said)
        when k.kind = 'word' and (s.value #>> '{}') = any (k.choices) is not true then
          format('must be one of %s, not %s', array_to_string(k.choices, ', '), s.said)
        when s.beside <> all (k.types) then
          format('goes with the type %s, not with %s', array_to_string(k.types, ' or '), s.beside)
        when k.kind = 'queue' and (jsonb_typeof(s.value) <> 'string' or s.value #>> '{}' !~ '^[a-z0-9_]{1,47}$') then
          format('must be a name that pgmq can take (1 to 47 lower-case letters, digits and _), not %s', s.value)
        when k.kind = 'table'
             and (jsonb_typeof(s.value) <> 'string' or s.value #>> '{}' !~ '^[a-z_][a-z0-9_]{0,62}$') then
          format('must be a table name (1 to 63 lower-case letters, digits and _, no digit first), not %s', s.value)
        when k.kind = 'text' and (jsonb_typeof(s.value) <> 'string' or s.value = '""') then
          format('must be a text, not %s', s.value)
        when k.kind = 'secret' and (jsonb_typeof(s.value) <> 'string' or s.value #>> '{}' !~ '^[^[:cntrl:]]+$') then
          format('must be a text on one line, not %s',
                 case when jsonb_typeof(s.value) = 'string' then 'this one' else 'a ' || jsonb_typeof(s.value) end)
        when k.kind = 'header' and (jsonb_typeof(s.value) <> 'string' or s.value #>> '{}' !~ '^[!-~]([ -~]*[!-~])?$') then
          'must be the text of an HTTP header, in ASCII and on one line, for example "Bearer ..." with your token'
        when k.kind = 'url' and (jsonb_typeof(s.value) <> 'string'
                                 or s.value #>> '{}' !~ '^https?://[^[:space:][:cntrl:]/?#@]+(/[^[:space:][:cntrl:]?#]*)?$') then
          'must be a URL such as https://gateway.example.com/hooks, without a user, a query or a fragment'
      end as complaint
    from (
      select s.*, case
                    when jsonb_typeof(s.value) in ('array', 'object') then 'an ' || jsonb_typeof(s.value)
                    when jsonb_typeof(s.value) = 'string'
                         and (s.path like 'mailbox.notifier%' or s.path in ('mailbox', 'mailbox.storage')) then 'a string'
                    else s.value::text
                  end as said
      from setting s
    ) s
    left join pgpark._config_keys() k using (path)
  )
  select c.* into bad from checked c where c.complaint is not null order by c.shown limit 1;
  if found then
    raise exception 'pools.%.%', _check_config.name, pgpark._on_one_line(bad.shown || ' ' || bad.complaint)
      using errcode = '22023';
  elsif config ->> 'max_units' is null and config #>> '{cost_model,gpu_vram_total_gb}' is null then
    raise exception 'pools.%.max_units is missing', _check_config.name
      using errcode = '22023', hint = 'How many units may be in use at once, for example {"max_units": 24}.';
  elsif jsonb_typeof(config #> '{mailbox,notifier}') = 'object'
        and coalesce(config #> '{mailbox,notifier,base_url}', 'null') = 'null' then
    raise exception 'pools.%.mailbox.notifier.base_url is missing', _check_config.name
      using errcode = '22023', hint = 'Where callbacks go, for example https://gateway.example.com/hooks.';
  elsif jsonb_typeof(config -> 'cost_model') = 'object' then
    perform pgpark._check_cost_model(format('pools.%s.cost_model', _check_config.name), config -> 'cost_model',
                                     derived => config ->> 'max_units' is null);
  end if;
end
$$;

-- What to say of a key that there is none of: the nearest right one, and all that belong there. dotted: the name itself
-- holds a dot, as in {"retry.max_attempts": 3}.
create or replace function pgpark._no_key(path text, dotted boolean) returns text
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  group_ text := coalesce(substring(_no_key.path from '^(.*)[.]'), '');
  name text := substring(_no_key.path from '[^.]*$');
  others text[];
  nearest text;
begin
  others := array(
    select substring(k.path from '[^.]*$')
    from pgpark._config_keys() k
    where k.path not like '%*'
      and coalesce(substring(k.path from '^(.*)[.]'), '') = case when dotted then '' else group_ end);
  select o.other into nearest
  from unnest(others) with ordinality as o (other, ord)
  where not dotted
    and pgpark._distance(o.other, name) <= greatest(2, length(name) / 3)
  order by pgpark._distance(o.other, name), o.ord
  limit 1;
  return 'is no key of a pool' || coalesce(' (did you mean ' || nearest || '?)', '') || '; here belong: '
         || array_to_string(others, ', ');
end
$$;

-- How many letters must be put in, taken out or replaced to make one word of another (Levenshtein's distance).
create or replace function pgpark._distance(a text, b text) returns int
language plpgsql immutable
set search_path = pgpark, pg_temp
as $$
declare
  above int[] := array(select generate_series(0, length(b)));
  line int[];
begin
  if length(a) > 100 or length(b) > 100 then
    return 100;
  end if;
  for i in 1 .. length(a) loop
    line := array[i];
    for j in 1 .. length(b) loop
      line[j + 1] := least(above[j + 1] + 1, line[j] + 1,
                           above[j] + (substr(a, i, 1) <> substr(b, j, 1))::int);
    end loop;
    above := line;
  end loop;
  return above[length(b) + 1];
end
$$;
