/* A stand-in for nbdkit's vddk plugin, with no VMware code in it.
 *
 * It takes the parameters virt-v2v gives the real one, serves a local file for
 * "[datastore] guest/guest.vmdk", and writes the debug lines that name the disk.
 * Like the real one it wants LIBDIR/lib64/libvixDiskLib.so.N, here an empty library.
 *
 * LIBDIR/lab.conf says what to serve and how fast:
 *   root=DIR         "[ds] a/b.vmdk" is DIR/ds/a/b-flat.vmdk
 *   thumbprint=..    refuse a connection made with another one
 *   rate=BYTES       bytes a second and disk, 0 means no limit
 *   rate_from=BYTES  the limit holds from this offset of the disk on
 */
#define NBDKIT_API_VERSION 2
#define _GNU_SOURCE
#include <nbdkit-plugin.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL

/* virt-v2v sets these with -D; nbdkit complains where they are missing. */
int vddk_debug_stats;
int vddk_debug_datapath;
int vddk_debug_diskinfo;
int vddk_debug_extents;

static char *file, *server, *user, *vm, *thumbprint, *libdir, *password;
static int library_version;

static char *disk_root, *right_thumbprint;
static uint64_t rate, rate_from;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

struct disk {
  int fd;
  int64_t size;
};

/* Parameters. */

static int
vddk_config (const char *key, const char *value)
{
  struct { const char *name; char **variable; } known[] = {
    { "file", &file }, { "server", &server }, { "user", &user }, { "vm", &vm },
    { "thumbprint", &thumbprint },
  };

  if (strcmp (key, "password") == 0)
    return nbdkit_read_password (value, &password);
  if (strcmp (key, "libdir") == 0)
    return (libdir = nbdkit_realpath (value)) ? 0 : -1;
  for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
    if (strcmp (key, known[i].name) == 0)
      return (*known[i].variable = strdup (value)) ? 0 : -1;
  nbdkit_error ("the stand-in does not know the parameter '%s'", key);
  return -1;
}

static int
vddk_config_complete (void)
{
  if (file && server && user && vm && thumbprint && libdir && password && password[0])
    return 0;
  nbdkit_error ("the stand-in needs file, server, user, vm, thumbprint, libdir and password");
  return -1;
}

/* The library and lab.conf. */

static int
load_library (void)
{
  char path[4096];

  for (int version = 8; version >= 6; version--) {
    snprintf (path, sizeof path, "%s/lib64/libvixDiskLib.so.%d", libdir ? libdir : "", version);
    if (dlopen (path, RTLD_NOW)) {
      library_version = version;
      return 0;
    }
  }
  nbdkit_error ("%s", dlerror ());
  return -1;
}

static int
read_lab_conf (void)
{
  char path[4096], line[4096], *value;
  FILE *conf;

  snprintf (path, sizeof path, "%s/lab.conf", libdir);
  if ((conf = fopen (path, "re")) == NULL) {
    nbdkit_error ("%s: %m", path);
    return -1;
  }
  while (fgets (line, sizeof line, conf)) {
    line[strcspn (line, "\n")] = '\0';
    if ((value = strchr (line, '=')) == NULL)
      continue;
    *value++ = '\0';
    if (strcmp (line, "root") == 0) disk_root = strdup (value);
    if (strcmp (line, "thumbprint") == 0) right_thumbprint = strdup (value);
    if (strcmp (line, "rate") == 0) rate = strtoull (value, NULL, 10);
    if (strcmp (line, "rate_from") == 0) rate_from = strtoull (value, NULL, 10);
  }
  fclose (conf);
  return 0;
}

static int
vddk_get_ready (void)
{
  return load_library () == 0 && read_lab_conf () == 0 ? 0 : -1;
}

static void
vddk_dump_plugin (void)
{
  printf ("vddk_default_libdir=/usr/lib/vmware-vix-disklib\n");
  if (libdir && load_library () == 0)
    printf ("vddk_library_version=%d\n", library_version);
}

/* Opening. */

/* "[ds] guest/guest.vmdk" -> "ROOT/ds/guest/guest-flat.vmdk"; NULL if it is no such name. */
static char *
local_path (void)
{
  char store[256], name[2048], *path;

  if (sscanf (file, "[%255[^]]] %2047[^\n]", store, name) != 2)
    return NULL;
  size_t stem = strlen (name) - strlen (".vmdk");
  if (asprintf (&path, "%s/%s/%.*s-flat.vmdk", disk_root, store, (int) stem, name) == -1)
    return NULL;
  return path;
}

static void *
vddk_open (int readonly)
{
  struct disk *disk;
  struct stat status;
  char *path = local_path ();
  int fd = path ? open (path, O_RDONLY | O_CLOEXEC) : -1;

  free (path);
  if (right_thumbprint && strcasecmp (right_thumbprint, thumbprint) != 0) {
    nbdkit_error ("VixDiskLib_Open: the thumbprint does not match the server");
    return NULL;
  }
  if (fd == -1 || fstat (fd, &status) == -1 || !(disk = malloc (sizeof *disk))) {
    nbdkit_error ("VixDiskLib_Open: %s: You do not have access rights to this file", file);
    return NULL;
  }
  nbdkit_debug ("Opening file %s (vpxa-nfcssl://%s@%s:902)", file, file, server);
  disk->fd = fd;
  disk->size = status.st_size;
  return disk;
}

static void
vddk_close (void *handle)
{
  struct disk *disk = handle;

  close (disk->fd);
  free (disk);
}

static int64_t
vddk_get_size (void *handle)
{
  return ((struct disk *) handle)->size;
}

/* Reading. */

static double
monotonic_seconds (void)
{
  struct timespec now;

  clock_gettime (CLOCK_MONOTONIC, &now);
  return now.tv_sec + now.tv_nsec / 1e9;
}

/* All threads draw on one allowance: each waits until its own bytes are due. */
static void
hold_back (uint32_t count)
{
  static double next_free;
  double now = monotonic_seconds (), due;

  pthread_mutex_lock (&lock);
  if (next_free < now)
    next_free = now;
  next_free += count / (double) rate;
  due = next_free;
  pthread_mutex_unlock (&lock);
  nbdkit_nanosleep ((unsigned) (due - now), (unsigned) ((due - now - (unsigned) (due - now)) * 1e9));
}

static int
vddk_pread (void *handle, void *buffer, uint32_t count, uint64_t offset, uint32_t flags)
{
  struct disk *disk = handle;

  if (rate && offset >= rate_from)
    hold_back (count);
  while (count > 0) {
    ssize_t got = pread (disk->fd, buffer, count, offset);
    if (got <= 0) {
      nbdkit_error ("VixDiskLib_ReadAsync: %m");
      return -1;
    }
    buffer = (char *) buffer + got;
    count -= got;
    offset += got;
  }
  return 0;
}

static int
vddk_can_extents (void *handle)
{
  return 1;
}

/* SEEK_DATA and SEEK_HOLE move the offset of the descriptor, but nothing here uses it. */
static int
vddk_extents (void *handle, uint32_t count, uint64_t offset, uint32_t flags,
              struct nbdkit_extents *extents)
{
  struct disk *disk = handle;
  uint64_t end = offset + count;

  while (offset < end) {
    off_t data = lseek (disk->fd, offset, SEEK_DATA);
    if (data == -1)
      data = disk->size;
    if ((uint64_t) data > offset
        && nbdkit_add_extent (extents, offset, data - offset,
                              NBDKIT_EXTENT_HOLE | NBDKIT_EXTENT_ZERO) == -1)
      return -1;
    if ((uint64_t) data >= end)
      break;
    off_t hole = lseek (disk->fd, data, SEEK_HOLE);
    if (nbdkit_add_extent (extents, data, hole - data, 0) == -1)
      return -1;
    offset = hole;
  }
  return 0;
}

static struct nbdkit_plugin plugin = {
  .name = "vddk",
  .longname = "stand-in for the VMware VDDK plugin",
  .config = vddk_config,
  .config_complete = vddk_config_complete,
  .magic_config_key = "file",
  .dump_plugin = vddk_dump_plugin,
  .get_ready = vddk_get_ready,
  .open = vddk_open,
  .close = vddk_close,
  .get_size = vddk_get_size,
  .pread = vddk_pread,
  .can_extents = vddk_can_extents,
  .extents = vddk_extents,
};

NBDKIT_REGISTER_PLUGIN (plugin)
