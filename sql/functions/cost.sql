-- Costs of language-model requests in units, by the pool's cost_model, and what a card can hold by it.
-- Called by clients that submit by tokens (park_submit_many, `pgpark submit --prompt-tokens`), by park_put_pool and by
-- operators. pgpark/costs.py gives the same numbers. Why there are two forms: docs/decisions/0011-cost-model.md.
--
-- Both forms come down to one rate (_llm_rate). Everything is numeric, and quotients are taken with div() and %, which
-- are exact; "/" rounds.
--
--   weights in every request   model_vram_gb, kv_per_token_mb, max_batch_tokens; a unit is a GiB
--   weights once               num_hidden_layers, num_key_value_heads and head_dim (or, for MLA, kv_lora_rank and
--                              qk_rope_head_dim), weights_gb; a request costs its KV cache; a unit is unit_mb MiB

create or replace function pgpark.park_llm_units(pool text, prompt_tokens int, max_tokens int) returns int
language plpgsql stable
security definer
set search_path = pgpark, pg_temp
as $$
declare
  lot pgpark.pool;
  rate record;
begin
  if pgpark._is_stranger() then
    perform pgpark._require(pgpark._kinds(), park_llm_units.pool, '{}',
                            format('ask for units of pool %L', park_llm_units.pool));
  end if;
  lot := pgpark._pool(park_llm_units.pool);
  select r.* into rate from pgpark._llm_rate(lot.cost_model) r;
  return pgpark._llm_charge(lot.name, rate.fixed_bytes, rate.token_bytes, rate.block_tokens, rate.most_tokens,
                            rate.unit_bytes, prompt_tokens, max_tokens, null);
end
$$;

comment on function pgpark.park_llm_units is
'Units of one request by the pool''s cost_model, at least 1. tokens = least(prompt_tokens + max_tokens, max_batch_tokens).
With model_vram_gb, in GiB: ceil(model_vram_gb + kv_per_token_mb * tokens / 1024). With num_hidden_layers, in units of
unit_mb MiB: the KV cache of the tokens, rounded up to blocks of block_tokens, and then to units; the weights are
charged once, in max_units. See park_llm_capacity.
Errors: 22023 (no cost model, negative tokens, more units than any pool can have), 42704, 42501.';

create or replace function pgpark.park_llm_capacity(cost_model jsonb)
returns table (bytes_per_token numeric, max_units int, max_tokens bigint)
language plpgsql stable
security definer
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  complaint text;
begin
  if jsonb_typeof(park_llm_capacity.cost_model) is distinct from 'object' then
    raise exception 'cost_model must be an object, not %',
                    coalesce(pgpark._on_one_line(park_llm_capacity.cost_model::text), 'NULL')
      using errcode = '22023';
  end if;
  begin
    perform pgpark._check_config('_', jsonb_build_object('max_units', 1, 'cost_model', park_llm_capacity.cost_model));
  exception
    when invalid_parameter_value then
      complaint := replace(sqlerrm, 'pools._.', '');
  end;
  complaint := coalesce(complaint, 'cost_model ' || pgpark._no_room(park_llm_capacity.cost_model));
  if complaint is not null then
    raise exception '%', complaint using errcode = '22023';
  end if;
  return query
  select r.token_bytes, u.units::int,
         case when u.units is not null and r.token_bytes > 0 then
           div(greatest(0, u.units * r.unit_bytes - r.fixed_bytes), r.token_bytes * r.block_tokens) * r.block_tokens
         end::bigint
  from pgpark._llm_rate(park_llm_capacity.cost_model) r
  cross join lateral (select div(r.room_bytes, r.unit_bytes) as units) u;
end
$$;

comment on function pgpark.park_llm_capacity is
'One row for a cost_model as in a pool''s config: bytes_per_token of KV cache; max_units of a pool on that card, where
gpu_vram_total_gb is given (else null); max_tokens whose KV cache these units hold at once beside one copy of the weights.
With model_vram_gb, max_units = floor(gpu_vram_total_gb - gpu_overhead_gb), in GiB. With num_hidden_layers, max_units =
floor((gpu_vram_total_gb * gpu_memory_utilization - weights_gb - gpu_overhead_gb) * 1024 / unit_mb), bytes_per_token =
2 * num_hidden_layers * num_key_value_heads * head_dim * kv_bytes, or with MLA
num_hidden_layers * (kv_lora_rank + qk_rope_head_dim) * kv_bytes.
Errors: 22023 (names the key; also where the card has no room for a unit).';

-- Units of one request by a rate, which a batch looks up once. pool: its name; position: the element of
-- park_submit_many, null for a single one.
create or replace function pgpark._llm_charge(
  pool text, fixed_bytes numeric, token_bytes numeric, block_tokens numeric, most_tokens numeric, unit_bytes numeric,
  prompt_tokens int, max_tokens int, "position" int)
returns int
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
declare
  tokens numeric;
  bytes numeric;
  units numeric;
begin
  if unit_bytes is null then
    raise exception 'pool % has no cost_model', quote_literal(pool)
      using errcode = '22023',
            hint = 'Give it one with park_put_pool: model_vram_gb, kv_per_token_mb, max_batch_tokens, or '
                   'num_hidden_layers, num_key_value_heads, head_dim, weights_gb.';
  elsif prompt_tokens is null or max_tokens is null or least(prompt_tokens, max_tokens) < 0 then
    perform pgpark._refuse_element(
      format('prompt_tokens and max_tokens must be whole numbers of at least 0, not %s and %s',
             coalesce(prompt_tokens::text, 'NULL'), coalesce(max_tokens::text, 'NULL')), "position");
  end if;
  tokens := least(prompt_tokens::bigint + max_tokens, most_tokens);
  bytes := fixed_bytes + token_bytes * pgpark._ceil_div(tokens, block_tokens) * block_tokens;
  units := greatest(1, pgpark._ceil_div(bytes, unit_bytes));
  if units > 2147483647 then
    perform pgpark._refuse_element(
      format('%s tokens would cost %s units, more than any pool can have; look at the cost_model of pool %L',
             prompt_tokens::bigint + max_tokens, units, pool), "position");
  end if;
  return units::int;
end
$$;

-- The quotient of numbers of at least 0, rounded up. Exact, as "/" is not.
create or replace function pgpark._ceil_div(amount numeric, by numeric) returns numeric
language sql immutable
as $$
  select div(amount, by) + (amount % by > 0)::int;
$$;

-- What a checked cost model comes down to: a request holds fixed_bytes, and token_bytes for each of its tokens, which
-- come in blocks and are at most most_tokens (null: no limit); a unit has unit_bytes; the card has room_bytes for
-- requests (null: not told). No row without a cost model.
create or replace function pgpark._llm_rate(cost_model jsonb)
returns table (fixed_bytes numeric, token_bytes numeric, block_tokens numeric, most_tokens numeric, unit_bytes numeric,
               room_bytes numeric)
language sql immutable
as $$
  select
    case when m.weights_once then 0 else m.model_vram_gb * 1073741824 end,
    case when not m.weights_once then m.kv_per_token_mb * 1048576
         else coalesce(2 * m.num_key_value_heads * m.head_dim, m.kv_lora_rank + m.qk_rope_head_dim)
              * m.num_hidden_layers * coalesce(m.kv_bytes, 2)
    end,
    case when m.weights_once then coalesce(m.block_tokens, 16) else 1 end,
    m.max_batch_tokens,
    case when m.weights_once then coalesce(m.unit_mb, 1) * 1048576 else 1073741824 end,
    case when m.weights_once then m.gpu_vram_total_gb * coalesce(m.gpu_memory_utilization, 0.9) - m.weights_gb
         else m.gpu_vram_total_gb
    end * 1073741824 - coalesce(m.gpu_overhead_gb, 0) * 1073741824
  from (
    select x.*, x.num_hidden_layers is not null as weights_once
    from jsonb_to_record(cost_model) as x (
      model_vram_gb numeric, kv_per_token_mb numeric, max_batch_tokens numeric, gpu_vram_total_gb numeric,
      gpu_overhead_gb numeric, weights_gb numeric, num_hidden_layers numeric, num_key_value_heads numeric,
      head_dim numeric, kv_lora_rank numeric, qk_rope_head_dim numeric, kv_bytes numeric, block_tokens numeric,
      unit_mb numeric, gpu_memory_utilization numeric)
    where cost_model is not null
  ) m;
$$;

-- What is wrong with the room that a cost model leaves on its card; null: nothing, or the card is not told.
create or replace function pgpark._no_room(cost_model jsonb) returns text
language plpgsql immutable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  return (
    select format('leaves %s GiB of gpu_vram_total_gb for requests, which is %s units of %s MiB; it must be 1 to 1000000000',
                  trim_scale(r.room_bytes / 1073741824), floor(r.room_bytes / r.unit_bytes),
                  trim_scale(r.unit_bytes / 1048576))
    from pgpark._llm_rate(_no_room.cost_model) r
    where not div(r.room_bytes, r.unit_bytes) between 1 and 1000000000);
end
$$;

-- max_units of a pool that leaves them to its checked cost model.
create or replace function pgpark._llm_max_units(cost_model jsonb) returns int
language plpgsql immutable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  return (select div(r.room_bytes, r.unit_bytes)::int from pgpark._llm_rate(_llm_max_units.cost_model) r);
end
$$;

-- Raises 22023 for keys that do not make up one of the two forms; each value alone has been checked before.
-- derived: max_units of the pool is left to it.
create or replace function pgpark._check_cost_model(path text, cost_model jsonb, derived boolean) returns void
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
declare
  given constant jsonb := jsonb_strip_nulls(cost_model);
  in_each constant text[] := array['model_vram_gb', 'kv_per_token_mb'];
  heads constant text[] := array['num_key_value_heads', 'head_dim'];
  latent constant text[] := array['kv_lora_rank', 'qk_rope_head_dim'];
  once constant text[] := heads || latent || array['num_hidden_layers', 'weights_gb', 'kv_bytes', 'block_tokens',
                                                   'unit_mb', 'gpu_memory_utilization'];
  complaint text;
begin
  complaint := case
    when given ?| in_each and given ?| once then
      format('has keys of two forms: %s charge the weights to every request, %s charge them once; give one of the two',
             pgpark._keys_of(given, in_each), pgpark._keys_of(given, once))
    when not given ?| once and not given ?& (in_each || array['max_batch_tokens']) then
      'needs model_vram_gb, kv_per_token_mb and max_batch_tokens'
    when not given ?| once then null
    when given ?| heads and given ?| latent then
      format('has %s beside %s: a model caches keys and values of its heads, or (MLA) a latent, not both',
             pgpark._keys_of(given, heads), pgpark._keys_of(given, latent))
    when not given ? 'num_hidden_layers' or not (given ?& heads or given ?& latent) then
      'needs num_hidden_layers with num_key_value_heads and head_dim, or (MLA) with kv_lora_rank and qk_rope_head_dim'
    when given ? 'gpu_vram_total_gb' and not given ? 'weights_gb' then
      'needs weights_gb beside gpu_vram_total_gb: the weights are charged to the card once'
    when (given ->> 'kv_bytes')::numeric > 8 then
      format('has kv_bytes %s; one cached number takes 1 (fp8), 2 (bfloat16, float16) or 4 (float32)', given -> 'kv_bytes')
    when (given ->> 'gpu_memory_utilization')::numeric > 1 then
      format('has gpu_memory_utilization %s; it is a share, above 0 and at most 1', given -> 'gpu_memory_utilization')
  end;
  if complaint is null and derived then
    complaint := pgpark._no_room(given);
  end if;
  if complaint is not null then
    raise exception '% %', path, complaint using errcode = '22023';
  end if;
end
$$;

-- Those of these keys that an object has, as people list them.
create or replace function pgpark._keys_of(object jsonb, keys text[]) returns text
language plpgsql immutable
set search_path = pgpark, pg_temp
as $$
begin
  return (select string_agg(k.key, ', ' order by k.ord)
          from unnest(keys) with ordinality as k (key, ord)
          where object ? k.key);
end
$$;
