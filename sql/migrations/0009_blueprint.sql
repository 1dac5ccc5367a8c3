-- What park_doctor compares the schema with, and a row of what it finds: docs/decisions/0017.
--
-- blueprint   each object of the schema as migrations left it, written at the end of each (functions/_blueprint.sql)

create table pgpark.blueprint (
  kind       text not null,
  object     text not null,
  within     text,
  definition text not null,
  make       text,
  remake     text,
  unmake     text,
  primary key (kind, object)
);

create type pgpark.finding as (
  problem    text,
  subject    text,
  detail     text,
  mend       text,
  disruptive boolean
);

comment on table pgpark.blueprint is 'The objects of the schema as the last migration left them.';
comment on column pgpark.blueprint.within is 'The object that this one is a part of: with that, it is missing too.';
comment on column pgpark.blueprint.definition is 'What is compared.';
comment on column pgpark.blueprint.make is 'SQL that makes the object where it is missing; null: only a backup has it.';
comment on column pgpark.blueprint.remake is 'SQL that makes a changed one what it was; null: unmake, then make.';
comment on column pgpark.blueprint.unmake is 'SQL that removes it; null: nobody is advised to.';
comment on type pgpark.finding is 'A row of park_doctor.';
