-- Run once, by PostgreSQL's image, when its volume is empty. The role owns its database, so it can run the
-- migrations, but it is neither SUPERUSER nor BYPASSRLS: the policies that keep tenants apart hold for it.
\getenv password STORE_PASSWORD
CREATE ROLE persona LOGIN NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE PASSWORD :'password';
CREATE DATABASE persona OWNER persona;
