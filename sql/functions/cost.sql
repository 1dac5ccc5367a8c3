-- Costs of language-model requests in units, by the pool's cost_model.

create or replace function pgpark.park_llm_units(pool text, prompt_tokens int, max_tokens int) returns int
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
declare
  lot pgpark.pool := pgpark._pool(park_llm_units.pool);
  model jsonb := lot.cost_model;
begin
  if model is null then
    raise exception 'pool % has no cost_model', quote_literal(lot.name)
      using errcode = '22023', hint = 'Give it one with park_put_pool: model_vram_gb, kv_per_token_mb, max_batch_tokens.';
  elsif prompt_tokens is null or max_tokens is null or least(prompt_tokens, max_tokens) < 0 then
    raise exception 'prompt_tokens and max_tokens must be whole numbers of at least 0, not % and %',
                    coalesce(prompt_tokens::text, 'NULL'), coalesce(max_tokens::text, 'NULL')
      using errcode = '22023';
  end if;
  return greatest(1, ceil(
    (model ->> 'model_vram_gb')::numeric
    + (model ->> 'kv_per_token_mb')::numeric
      * least(prompt_tokens::bigint + max_tokens, (model ->> 'max_batch_tokens')::numeric) / 1024))::int;
end
$$;

comment on function pgpark.park_llm_units is
'Units (GiB) of one request by the pool''s cost_model: the model''s weights plus its share of the KV cache, rounded up:
ceil(model_vram_gb + kv_per_token_mb * least(prompt_tokens + max_tokens, max_batch_tokens) / 1024), at least 1.
Errors: 22023 (no cost model, negative tokens), 42704.';
