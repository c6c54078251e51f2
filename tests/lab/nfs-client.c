/*
 * nfs-client HOST:/PATH MOUNTPOINT
 *
 * A mount helper for machines whose kernel has no NFS client: FUSE mounts what libnfs reads and
 * writes. It returns when that is mounted, and then serves it in the background until it is
 * unmounted. As a hard mount does, it waits for ever for a server that does not answer. Each
 * request is made as the user and group of the process behind it.
 */
#define FUSE_USE_VERSION 31
#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <fuse.h>
#include <nfsc/libnfs.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/statvfs.h>
#include <unistd.h>

static struct nfs_context *context;

/* Return the connection, to be used for the process that makes the present request. */
static struct nfs_context *
nfs (void)
{
  nfs_set_uid (context, fuse_get_context ()->uid);
  nfs_set_gid (context, fuse_get_context ()->gid);
  return context;
}

static struct nfsfh *
handle (struct fuse_file_info *fi)
{
  return (struct nfsfh *) (uintptr_t) fi->fh;
}

static int
get_attributes (const char *path, struct stat *st, struct fuse_file_info *fi)
{
  struct nfs_stat_64 found;
  int error = nfs_lstat64 (nfs (), path, &found);

  if (error)
    return error;
  memset (st, 0, sizeof *st);
  st->st_ino = found.nfs_ino;
  st->st_mode = found.nfs_mode;
  st->st_nlink = found.nfs_nlink;
  st->st_uid = found.nfs_uid;
  st->st_gid = found.nfs_gid;
  st->st_size = found.nfs_size;
  st->st_blksize = found.nfs_blksize;
  st->st_blocks = found.nfs_used / 512;
  st->st_atim.tv_sec = found.nfs_atime;
  st->st_mtim.tv_sec = found.nfs_mtime;
  st->st_ctim.tv_sec = found.nfs_ctime;
  return 0;
}

static int
read_directory (const char *path, void *buffer, fuse_fill_dir_t fill, off_t offset,
                struct fuse_file_info *fi, enum fuse_readdir_flags flags)
{
  struct nfsdir *directory;
  struct nfsdirent *entry;
  int error = nfs_opendir (nfs (), path, &directory);

  if (error)
    return error;
  while ((entry = nfs_readdir (context, directory)) != NULL)
    fill (buffer, entry->name, NULL, 0, 0);
  nfs_closedir (context, directory);
  return 0;
}

static int
make_directory (const char *path, mode_t mode)
{
  return nfs_mkdir2 (nfs (), path, mode);
}

static int
remove_directory (const char *path)
{
  return nfs_rmdir (nfs (), path);
}

static int
remove_file (const char *path)
{
  return nfs_unlink (nfs (), path);
}

static int
rename_file (const char *from, const char *to, unsigned int flags)
{
  return flags ? -EINVAL : nfs_rename (nfs (), from, to);
}

static int
change_mode (const char *path, mode_t mode, struct fuse_file_info *fi)
{
  return nfs_chmod (nfs (), path, mode);
}

static int
change_owner (const char *path, uid_t uid, gid_t gid, struct fuse_file_info *fi)
{
  return nfs_chown (nfs (), path, uid, gid);
}

static int
change_size (const char *path, off_t size, struct fuse_file_info *fi)
{
  return fi ? nfs_ftruncate (nfs (), handle (fi), size) : nfs_truncate (nfs (), path, size);
}

static int
open_file (const char *path, struct fuse_file_info *fi)
{
  struct nfsfh *file;
  int error = nfs_open (nfs (), path, fi->flags & (O_ACCMODE | O_TRUNC), &file);

  fi->fh = error ? 0 : (uintptr_t) file;
  return error;
}

static int
create_file (const char *path, mode_t mode, struct fuse_file_info *fi)
{
  struct nfsfh *file;
  int error = nfs_open2 (nfs (), path, (fi->flags & (O_ACCMODE | O_TRUNC | O_EXCL)) | O_CREAT,
                         mode & 07777, &file);

  fi->fh = error ? 0 : (uintptr_t) file;
  return error;
}

static int
read_file (const char *path, char *buffer, size_t size, off_t offset, struct fuse_file_info *fi)
{
  return nfs_pread (nfs (), handle (fi), offset, size, buffer);
}

static int
write_file (const char *path, const char *buffer, size_t size, off_t offset,
            struct fuse_file_info *fi)
{
  return nfs_pwrite (nfs (), handle (fi), offset, size, buffer);
}

static int
sync_file (const char *path, int data_only, struct fuse_file_info *fi)
{
  return nfs_fsync (nfs (), handle (fi));
}

static int
close_file (const char *path, struct fuse_file_info *fi)
{
  return nfs_close (nfs (), handle (fi));
}

static int
get_room (const char *path, struct statvfs *room)
{
  return nfs_statvfs (nfs (), path, room);
}

static const struct fuse_operations operations = {
  .getattr = get_attributes,
  .readdir = read_directory,
  .mkdir = make_directory,
  .rmdir = remove_directory,
  .unlink = remove_file,
  .rename = rename_file,
  .chmod = change_mode,
  .chown = change_owner,
  .truncate = change_size,
  .open = open_file,
  .create = create_file,
  .read = read_file,
  .write = write_file,
  .fsync = sync_file,
  .release = close_file,
  .statfs = get_room,
};

/* Connect to the server. */
static void
connect_to (char *spec)
{
  char *path = strchr (spec, ':');

  *path++ = '\0';
  context = nfs_init_context ();
  if (!context) {
    fprintf (stderr, "mount.nfs: out of memory\n");
    exit (32);
  }
  nfs_set_autoreconnect (context, -1);
  nfs_set_dircache (context, 0);
  if (nfs_mount (context, spec, path) != 0) {
    fprintf (stderr, "mount.nfs: access denied by server while mounting %s:%s (%s)\n",
             spec, path, nfs_get_error (context));
    exit (32);
  }
}

int
main (int argc, char **argv)
{
  char *options;
  struct fuse *fuse;

  if (argc != 3 || !strchr (argv[1], ':')) {
    fprintf (stderr, "usage: nfs-client HOST:/PATH MOUNTPOINT\n");
    return 1;
  }
  connect_to (strdup (argv[1]));
  if (asprintf (&options, "allow_other,default_permissions,nosuid,nodev,noexec,fsname=%s,"
                "subtype=nfs", argv[1]) < 0)
    return 1;

  struct fuse_args arguments = FUSE_ARGS_INIT (3, ((char *[]) { argv[0], "-o", options, NULL }));
  fuse = fuse_new (&arguments, &operations, sizeof operations, NULL);
  if (!fuse || fuse_mount (fuse, argv[2]) != 0 || fuse_daemonize (0) != 0)
    return 32;
  /* Not seen from here, it is unmounted when the last process goes that does see it. */
  if (unshare (CLONE_NEWNS) != 0 || mount (NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0
      || umount2 (argv[2], MNT_DETACH) != 0)
    return 1;
  fuse_loop (fuse);
  return 0;
}
